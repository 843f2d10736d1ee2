// Registers AdapterFusion for the CPU key: tensors to matrices, and the build for this processor.
#include "adapter_fusion.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common.h"
#include "matrix/isa.h"
#include "options.h"

namespace peft_kernels {
namespace {

using Maybe = std::optional<Tensor>;

const AdapterFusionKernels& kernels() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return adapter_fusion_avx512;
    case Isa::avx2: return adapter_fusion_avx2;
#endif
    default: return adapter_fusion_baseline;
  }
}

// Tensors as matrices, for as long as this lives: it holds the copies of those that needed one.
class Matrices {
 public:
  Matrix of(Tensor tensor, int64_t rows, int64_t cols, const char* name, bool rows_only = true) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == rows &&
                        tensor.size(1) == cols,
                    name, " must be [", rows, ", ", cols, "] on the CPU");
    held_.push_back(with_unit_stride(tensor, rows_only));
    return matrix_of(held_.back(), name);
  }

  Matrix row_of(const Tensor& tensor, int64_t size, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == size, name,
                    " must be [", size, "] on the CPU");
    return {tensor.mutable_data_ptr(), dtype_of(tensor, name), 1, size, size, tensor.stride(0)};
  }

  Matrix floats_of(const Tensor& tensor, int64_t rows, int64_t cols, const char* name) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float, name,
                    " must be contiguous float32");
    return of(tensor, rows, cols, name);
  }

 private:
  std::vector<Tensor> held_;
};

class Inputs {
 public:
  Inputs(const Tensor& x, const Maybe& query, const Tensor& down_weight, const Tensor& down_bias,
         const Tensor& score_weight, const Tensor& score_bias, const Tensor& mix_weight,
         const Tensor& mix_bias, std::vector<int64_t> sizes, const std::string& activation)
      : sizes_(std::move(sizes)) {
    STD_TORCH_CHECK(x.dim() == 2 && mix_weight.dim() == 2, "x and mix_weight must be matrices");
    const bool positive = std::all_of(sizes_.begin(), sizes_.end(), [](auto r) { return r > 0; });
    STD_TORCH_CHECK(!sizes_.empty() && positive, "sizes must hold at least one, and none below 1");
    m = x.size(0), k = x.size(1), d = query ? query->size(1) : k, n = mix_weight.size(0);
    ranks = std::accumulate(sizes_.begin(), sizes_.end(), int64_t(0)), adapters = sizes_.size();
    if (query) query_ = matrices.of(*query, m, d, "query");
    in = {.x = matrices.of(x, m, k, "x"),
          .query = query ? &*query_ : nullptr,
          .down_weight = matrices.of(down_weight, ranks, k, "down_weight"),
          .score_weight = matrices.of(score_weight, ranks + adapters, d, "score_weight"),
          .down_bias = matrices.row_of(down_bias, ranks, "down_bias"),
          .score_bias = matrices.row_of(score_bias, ranks + adapters, "score_bias"),
          .mix_weight = matrices.of(mix_weight, n, ranks, "mix_weight"),
          .mix_bias = matrices.of(mix_bias, adapters, n, "mix_bias", false),
          .sizes = sizes_.data(),
          .adapters = adapters,
          .activation = activation_of(activation)};
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  int64_t m, k, d, n, ranks, adapters;
  FusionInputs in;
  Matrices matrices;

 private:
  std::vector<int64_t> sizes_;
  std::optional<Matrix> query_;
};

// An output of the backward: of size 0 where it isn't wanted, and 0 where it is a sum of no rows.
struct Output {
  Tensor tensor;
  std::optional<Matrix> matrix;

  Output(const Tensor& like, bool needed, std::vector<int64_t> shape, ScalarType dtype)
      : tensor(torch::stable::new_empty(like, needed ? shape : std::vector<int64_t>{0}, dtype)) {
    if (like.size(0) == 0) tensor = torch::stable::zero_(tensor);
    if (needed && shape.size() == 2) matrix = matrix_of(tensor, "gradient");
  }
  const Matrix* wanted() const { return matrix ? &*matrix : nullptr; }
  float* floats() const { return tensor.mutable_data_ptr<float>(); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> adapter_fusion_fwd(
    Tensor x, Maybe query, Tensor down_weight, Tensor down_bias, Tensor score_weight,
    Tensor score_bias, Tensor mix_weight, Tensor mix_bias, std::vector<int64_t> sizes,
    std::string activation, Maybe residual) {
  Inputs i(x, query, down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias, sizes,
           activation);
  const auto floats = [&](int64_t cols) {
    return torch::stable::new_empty(x, {i.m, cols}, ScalarType::Float);
  };
  Tensor y = torch::stable::new_empty(x, {i.m, i.n});
  Tensor z = floats(i.ranks), w = floats(i.ranks + i.adapters), p = floats(i.adapters);
  std::optional<Matrix> residual_rows;
  if (residual) residual_rows = i.matrices.of(*residual, i.m, i.n, "residual", false);
  kernels().forward({.in = i.in,
                     .residual = residual ? &*residual_rows : nullptr,
                     .y = matrix_of(y, "y"),
                     .z = matrix_of(z, "z"),
                     .w = matrix_of(w, "w"),
                     .p = matrix_of(p, "p")},
                    torch_threads());
  return {y, z, w, p};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_fusion_bwd(
    Tensor dy, Tensor x, Maybe query, Tensor down_weight, Tensor down_bias, Tensor score_weight,
    Tensor score_bias, Tensor mix_weight, Tensor mix_bias, std::vector<int64_t> sizes,
    std::string activation, Tensor z, Tensor w, Tensor p, bool needs_x, bool needs_query,
    bool needs_down, bool needs_score, bool needs_mix) {
  Inputs i(x, query, down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias, sizes,
           activation);
  const ScalarType base = x.scalar_type(), wide = ScalarType::Float;
  const int64_t scores = i.ranks + i.adapters;
  const Output dx(x, needs_x, {i.m, i.k}, base), dq(x, needs_query, {i.m, i.d}, base);
  const Output d_down(x, needs_down, {i.ranks, i.k}, wide);
  const Output d_down_bias(x, needs_down, {i.ranks}, wide);
  const Output d_score(x, needs_score, {scores, i.d}, wide);
  const Output d_score_bias(x, needs_score, {scores}, wide);
  const Output d_mix(x, needs_mix, {i.n, i.ranks}, wide);
  const Output d_mix_bias(x, needs_mix, {i.adapters, i.n}, wide);
  kernels().backward({.in = i.in,
                      .dy = i.matrices.of(dy, i.m, i.n, "dy", false),
                      .z = i.matrices.floats_of(z, i.m, i.ranks, "z"),
                      .w = i.matrices.floats_of(w, i.m, scores, "w"),
                      .p = i.matrices.floats_of(p, i.m, i.adapters, "p"),
                      .dx = dx.wanted(),
                      .dq = dq.wanted(),
                      .d_down = d_down.wanted(),
                      .d_score = d_score.wanted(),
                      .d_down_bias = d_down_bias.floats(),
                      .d_score_bias = d_score_bias.floats(),
                      .d_mix = d_mix.wanted(),
                      .d_mix_bias = d_mix_bias.wanted()},
                     torch_threads());
  return {dx.tensor,           dq.tensor,    d_down.tensor, d_down_bias.tensor, d_score.tensor,
          d_score_bias.tensor, d_mix.tensor, d_mix_bias.tensor};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, library) {
  library.impl("adapter_fusion_fwd", TORCH_BOX(&peft_kernels::adapter_fusion_fwd));
  library.impl("adapter_fusion_bwd", TORCH_BOX(&peft_kernels::adapter_fusion_bwd));
}
