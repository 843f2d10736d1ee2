// The torch side of every native op: checks, and the way from tensors to plain matrices.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/matrix/matrix.h"

namespace peft_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16 for the native kernel");
  }
}

// A tensor whose rows or columns are contiguous: itself, or a contiguous copy.
inline Tensor with_unit_stride(const Tensor& tensor, bool rows_only) {
  const bool rows = tensor.stride(1) == 1 || tensor.size(1) <= 1;
  const bool cols = tensor.stride(0) == 1 || tensor.size(0) <= 1;
  return rows || (cols && !rows_only) ? tensor : torch::stable::contiguous(tensor);
}

// The strides of a dimension of size 1 mean nothing; they are set to those of a contiguous tensor.
inline Matrix matrix_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions");
  Matrix m{tensor.mutable_data_ptr(), dtype_of(tensor, name), tensor.size(0), tensor.size(1),
           tensor.stride(0), tensor.stride(1)};
  if (m.cols <= 1) m.col_stride = 1;
  if (m.rows <= 1) m.row_stride = m.col_stride == 1 ? m.cols : 1;
  return m;
}

template <class T>
T read_scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 0, name, " must be a 0-d tensor on the CPU");
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return static_cast<T>(*tensor.const_data_ptr<double>());
    case ScalarType::Float: return static_cast<T>(*tensor.const_data_ptr<float>());
    case ScalarType::Half:
      return static_cast<T>(float(*tensor.const_data_ptr<torch::headeronly::Half>()));
    case ScalarType::BFloat16:
      return static_cast<T>(float(*tensor.const_data_ptr<torch::headeronly::BFloat16>()));
    case ScalarType::Long: return static_cast<T>(*tensor.const_data_ptr<int64_t>());
    case ScalarType::Int: return static_cast<T>(*tensor.const_data_ptr<int32_t>());
    default: STD_TORCH_CHECK(false, name, " has a dtype that the native kernel can't read");
  }
}

inline Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t tasks, void (*task)(void*, int64_t), void* ctx) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; i++) task(ctx, i);
            });
          }};
}

}  // namespace peft_kernels
