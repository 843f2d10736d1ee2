// Registers the decode plan of multi-LoRA linear for the CUDA key: tensors to pointers, and the
// cooperative launch. Nothing here waits for the GPU, so that a CUDA graph can hold it.
#include "multi_lora_linear.cuh"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "launch.h"

namespace peft_kernels {
namespace {

using cuda::MAX_BANKS;
using cuda::MAX_SIZE;

void check(cudaError_t status, const char* call) { check_cuda(status, "multi_lora_linear", call); }

// The tensors of a call: without a weight, the rest is added to y.
struct Call {
  Tensor x;
  std::optional<Tensor> weight, bias;
  std::vector<Tensor> a, b, tables, ranks, scales;
  Tensor ids, y, s;
};

int int_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size <= MAX_SIZE, "multi_lora_linear: ", name, " = ", size, " is too large");
  return static_cast<int>(size);
}

// ---- checks ----------------------------------------------------------------------------------

// Rows that begin with whole vectors where their length lets them; a copy of x is cheap.
Tensor vector_rows(Tensor x) {
  x = with_unit_stride(x, true);
  const int64_t size = size_of(dtype_of(x, "x"));
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const bool odd = x.size(1) * size % 16 != 0;
  const bool begins_well = begin % 16 == 0 && (x.size(0) <= 1 || x.stride(0) * size % 16 == 0);
  return odd || begins_well ? x : torch::stable::clone(x);
}

void check_like(const Tensor& tensor, ScalarType dtype, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == x.device(), name, " must be on x's device");
}

void check_rows(const Tensor& tensor, ScalarType dtype, const Tensor& x, const char* name) {
  check_like(tensor, dtype, x, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// Returns the width of S.
int64_t check_banks(const Call& c) {
  const size_t count = c.a.size();
  STD_TORCH_CHECK(count >= 1 && count <= size_t(MAX_BANKS), "the decode plan takes 1 to ",
                  MAX_BANKS, " banks; got ", count);
  for (const auto* list : {&c.b, &c.tables, &c.ranks, &c.scales})
    STD_TORCH_CHECK(list->size() == count, "every bank must have a, b, a table, ranks and scales");
  const ScalarType adapter = c.a[0].scalar_type();
  STD_TORCH_CHECK(adapter == ScalarType::Float || adapter == c.x.scalar_type(),
                  "a bank must be float32 or have x's dtype");
  int64_t width = 0, s_columns = 0;
  for (size_t j = 0; j < count; j++) {
    check_rows(c.a[j], adapter, c.x, "a"), check_rows(c.b[j], adapter, c.x, "b");
    check_rows(c.tables[j], ScalarType::Int, c.x, "table");
    check_rows(c.ranks[j], ScalarType::Int, c.x, "ranks");
    check_rows(c.scales[j], ScalarType::Float, c.x, "scales");
    STD_TORCH_CHECK(c.a[j].size(1) == c.x.size(1), "a must be [rows, k] for x [m, k]");
    width += c.b[j].size(1), s_columns += c.tables[j].size(1) * cuda::PAGE;
  }
  STD_TORCH_CHECK(width == c.y.size(1), "the banks' widths must add up to the outputs");
  check_rows(c.ids, ScalarType::Int, c.x, "ids");
  const int64_t ids = c.ids.numel(), m = c.x.size(0);
  STD_TORCH_CHECK(m == 0 || (ids > 0 && m % ids == 0), "ids must serve x's rows in equal parts");
  return s_columns;
}

// ---- the launch ------------------------------------------------------------------------------

template <class T, class A>
cuda::Params<T, A> params_of(const Call& c) {
  cuda::Params<T, A> p{};
  p.m = int_size(c.x.size(0), "m"), p.n = int_size(c.y.size(1), "n");
  p.k = int_size(c.x.size(1), "k"), p.s_columns = int_size(c.s.size(1), "the rank");
  p.x = static_cast<const T*>(c.x.const_data_ptr());
  p.x_stride = p.m <= 1 ? p.k : c.x.stride(0);
  p.has_base = c.weight.has_value();
  if (p.has_base) {
    p.weight = static_cast<const T*>(c.weight->const_data_ptr());
    p.weight_stride = p.n <= 1 ? p.k : c.weight->stride(0);
  }
  if (c.bias) p.bias = static_cast<const T*>(c.bias->const_data_ptr());
  p.y = static_cast<T*>(c.y.mutable_data_ptr());
  p.s = c.s.mutable_data_ptr<float>();
  p.ids = c.ids.const_data_ptr<int32_t>();
  p.rows_per_id = static_cast<int>(p.m / c.ids.numel());
  p.slots = int_size(c.ranks[0].size(0), "slots");
  p.bank_count = static_cast<int>(c.a.size());
  for (int j = 0; j < p.bank_count; j++) {
    cuda::Bank<A>& bank = p.banks[j];
    bank.a = static_cast<const A*>(c.a[j].const_data_ptr());
    bank.b = static_cast<const A*>(c.b[j].const_data_ptr());
    bank.table = c.tables[j].const_data_ptr<int32_t>();
    bank.ranks = c.ranks[j].const_data_ptr<int32_t>();
    bank.scales = c.scales[j].const_data_ptr<float>();
    bank.width = static_cast<int>(c.b[j].size(1));
    bank.max_pages = static_cast<int>(c.tables[j].size(1));
  }
  return p;
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

template <class T, class A>
void launch(const Call& c) {
  auto p = params_of<T, A>(c);
  const int device = c.x.get_device_index();
  const CurrentDevice current(device, "multi_lora_linear");
  const auto plan = cuda::plan(p, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const int64_t shrinks = (int64_t(p.m) * p.s_columns + cuda::WARPS - 1) / cuda::WARPS;
  const int64_t wanted = std::max<int64_t>({1, p.tiles, p.has_base ? 0 : shrinks});
  cuda::with_kernel(p, plan, [&](auto kernel) {
    const auto shared = static_cast<int>(plan.shared_bytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "cudaFuncSetAttribute");
    int at_once = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel, cuda::THREADS, shared),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    at_once *= attribute(cudaDevAttrMultiProcessorCount, device);
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(wanted, at_once));
    void* arguments[] = {&p};
    check(cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(cuda::THREADS), arguments, shared,
                                      current_stream(device)),
          "cudaLaunchCooperativeKernel");
  });
}

template <class T>
void launch_with_adapters(const Call& c) {
  c.a[0].scalar_type() == ScalarType::Float ? launch<T, float>(c) : launch<T, T>(c);
}

void run(Call& c) {
  c.s = torch::stable::new_empty(c.x, {c.x.size(0), check_banks(c)}, ScalarType::Float);
  if (c.x.size(0) == 0) return;
  switch (dtype_of(c.x, "x")) {
    case DType::f32: return launch<float, float>(c);
    case DType::f16: return launch_with_adapters<cuda::Half>(c);
    case DType::bf16: return launch_with_adapters<cuda::BFloat16>(c);
  }
}

// ---- the ops ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> decode(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                  std::vector<Tensor> a, std::vector<Tensor> b,
                                  std::vector<Tensor> tables, std::vector<Tensor> ranks,
                                  std::vector<Tensor> scales, Tensor ids) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1),
                  "weight must be [n, k] for x [m, k]");
  weight = with_unit_stride(weight, true);
  if (bias) {
    bias = torch::stable::contiguous(*bias);
    check_like(*bias, x.scalar_type(), x, "bias");
    STD_TORCH_CHECK(bias->numel() == weight.size(0), "bias must be [n] for weight [n, k]");
  }
  check_like(weight, x.scalar_type(), x, "weight");
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  Call call{vector_rows(x), weight, bias, a, b, tables, ranks, scales,
            torch::stable::contiguous(ids), y, Tensor()};
  run(call);
  return {y, call.s};
}

Tensor decode_add(Tensor y, Tensor x, std::vector<Tensor> a, std::vector<Tensor> b,
                  std::vector<Tensor> tables, std::vector<Tensor> ranks, std::vector<Tensor> scales,
                  Tensor ids) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && y.size(0) == x.size(0),
                  "y must be [m, n] for x [m, k]");
  check_rows(y, x.scalar_type(), x, "y");
  Call call{vector_rows(x), {}, {}, a, b, tables, ranks, scales,
            torch::stable::contiguous(ids), y, Tensor()};
  run(call);
  return call.s;
}

}  // namespace
}  // namespace peft_kernels

#define PK_BANKS \
  "Tensor[] a, Tensor[] b, Tensor[] tables, Tensor[] ranks, Tensor[] scales, Tensor ids"

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, library) {
  library.def("multi_lora_linear_decode(Tensor x, Tensor weight, Tensor? bias, " PK_BANKS
              ") -> (Tensor, Tensor)");
  library.def("multi_lora_linear_decode_add(Tensor(a!) y, Tensor x, " PK_BANKS ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, PK_KEY, library) {
  library.impl("multi_lora_linear_decode", TORCH_BOX(&peft_kernels::decode));
  library.impl("multi_lora_linear_decode_add", TORCH_BOX(&peft_kernels::decode_add));
}
