// Registers LoRA linear for the CPU key: tensors to matrices, and the build for this processor.
#include "lora_linear_op.h"

#include <optional>
#include <string>
#include <tuple>

#include "../common.h"

namespace peft_kernels {

const LoRALinearKernels& lora_linear_kernels() { return lora_linear_kernels(chosen_isa()); }

const LoRALinearKernels& lora_linear_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512: return lora_linear_avx512;
    case Isa::avx2: return lora_linear_avx2;
#endif
    default: return lora_linear_baseline;
  }
}

std::optional<Matrix> bias_row(const std::optional<Tensor>& bias, int64_t n) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias must be [n]");
  return Matrix{bias->mutable_data_ptr(), dtype_of(*bias, "bias"), 1, n, n, bias->stride(0)};
}

namespace {

constexpr int64_t MKL_ROWS = 128;  // fewest float32 rows whose base product is torch's

bool has_bf16_products() {
#if defined(__x86_64__)
  static const bool found =
      !isa_is_asked() &&
      (__builtin_cpu_supports("avx512bf16") || __builtin_cpu_supports("amx-bf16"));
  return found;
#else
  return false;
#endif
}

bool has_intel_avx512() {
#if defined(__x86_64__)
  static const bool found =
      !isa_is_asked() && chosen_isa() == Isa::avx512 && __builtin_cpu_is("intel");
  return found;
#else
  return false;
#endif
}

// Whether taking the base product from torch and adding the rest in place beats one pass here.
// bfloat16 that torch multiplies in hardware: half the time at 512 x 2048 x 2048 on Zen 4. Up to
// 4 rows reading the weight is all there is, and these kernels read it once. float32 on Intel's
// AVX-512, where torch's MKL reaches 0.9 of the peak and the tiles lose a quarter to a busy L2.
bool base_from_torch(const Tensor& x) {
  if (x.scalar_type() == ScalarType::BFloat16) return x.size(0) > 4 && has_bf16_products();
  return x.scalar_type() == ScalarType::Float && x.size(0) >= MKL_ROWS && has_intel_avx512();
}

void check_shapes(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                  const Tensor& lora_b) {
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "weight must be [n, k] for x [m, k]");
  STD_TORCH_CHECK(lora_a.size(1) == x.size(1), "lora_a must be [r, k] for x [m, k]");
  STD_TORCH_CHECK(lora_b.size(0) == weight.size(0) && lora_b.size(1) == lora_a.size(0),
                  "lora_b must be [n, r] for weight [n, k] and lora_a [r, k]");
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear_with_gain(Tensor x, Tensor weight,
                                                 std::optional<Tensor> bias, const float* gain,
                                                 Tensor lora_a, Tensor lora_b, double scale,
                                                 std::optional<Tensor> scale_t, double dropout_p,
                                                 std::optional<Tensor> seed) {
  check_shapes(x, weight, lora_a, lora_b);
  x = with_unit_stride(x, true), weight = with_unit_stride(weight, false);
  lora_a = with_unit_stride(lora_a, true), lora_b = with_unit_stride(lora_b, true);
  const int64_t m = x.size(0), n = weight.size(0), r = lora_a.size(0);
  const bool has_base = base_from_torch(x);
  Tensor y = has_base ? torch::stable::matmul(x, torch::stable::transpose(weight, 0, 1))
                      : torch::stable::new_empty(x, {m, n});
  Tensor s = torch::stable::new_empty(x, {m, r}, ScalarType::Float);
  const auto dropout = dropout_of(dropout_p, seed);
  const std::optional<Matrix> row = bias_row(bias, n);
  lora_linear_kernels().forward({.x = matrix_of(x, "x"),
                                 .weight = matrix_of(weight, "weight"),
                                 .lora_a = matrix_of(lora_a, "lora_a"),
                                 .lora_b = matrix_of(lora_b, "lora_b"),
                                 .bias = row ? &*row : nullptr,
                                 .gain = gain,
                                 .dropout = dropout ? &*dropout : nullptr,
                                 .scale = scale_of(scale, scale_t),
                                 .y = matrix_of(y, "y"),
                                 .has_base = has_base,
                                 .s = s.mutable_data_ptr<float>()},
                                torch_threads());
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_bwd(Tensor dy, Tensor x, Tensor weight,
                                                   Tensor lora_a, Tensor lora_b, Tensor s,
                                                   double scale, std::optional<Tensor> scale_t,
                                                   double dropout_p, std::optional<Tensor> seed,
                                                   bool needs_x, bool needs_a, bool needs_b) {
  check_shapes(x, weight, lora_a, lora_b);
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.size(1) == weight.size(0), "dy must be [m, n]");
  STD_TORCH_CHECK(s.is_contiguous() && s.scalar_type() == ScalarType::Float, "s must be float32");
  STD_TORCH_CHECK(s.size(0) == x.size(0) && s.size(1) == lora_a.size(0), "s must be [m, r]");
  x = with_unit_stride(x, true), dy = with_unit_stride(dy, true);
  weight = with_unit_stride(weight, false);
  lora_a = with_unit_stride(lora_a, true), lora_b = with_unit_stride(lora_b, true);
  const auto shaped = [](const Tensor& like, bool needed) {
    if (!needed) return torch::stable::new_empty(like, {0});
    return torch::stable::new_empty(like, {like.size(0), like.size(1)});
  };
  const bool has_base = needs_x && base_from_torch(x);
  Tensor dx = has_base ? torch::stable::matmul(dy, weight) : shaped(x, needs_x);
  Tensor da = shaped(lora_a, needs_a), db = shaped(lora_b, needs_b);
  std::optional<Matrix> dx_out, da_out, db_out;
  if (needs_x) dx_out = matrix_of(dx, "dx");
  if (needs_a) da_out = matrix_of(da, "da");
  if (needs_b) db_out = matrix_of(db, "db");
  const auto dropout = dropout_of(dropout_p, seed);
  lora_linear_kernels().backward({.dy = matrix_of(dy, "dy"),
                                  .x = matrix_of(x, "x"),
                                  .weight = matrix_of(weight, "weight"),
                                  .lora_a = matrix_of(lora_a, "lora_a"),
                                  .lora_b = matrix_of(lora_b, "lora_b"),
                                  .s = s.const_data_ptr<float>(),
                                  .dropout = dropout ? &*dropout : nullptr,
                                  .scale = scale_of(scale, scale_t),
                                  .dx = dx_out ? &*dx_out : nullptr,
                                  .da = da_out ? &*da_out : nullptr,
                                  .db = db_out ? &*db_out : nullptr,
                                  .has_base = has_base},
                                 torch_threads());
  return {dx, da, db};
}

namespace {

std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                           Tensor lora_a, Tensor lora_b, double scale,
                                           std::optional<Tensor> scale_t, double dropout_p,
                                           std::optional<Tensor> seed) {
  return lora_linear_with_gain(x, weight, bias, nullptr, lora_a, lora_b, scale, scale_t, dropout_p,
                               seed);
}

std::string native_info() {
  std::string info = std::string(lora_linear_kernels().isa) + " kernels, no BLAS";
  if (has_bf16_products()) info += "; bfloat16 base products beyond 4 rows by torch, in hardware";
  if (has_intel_avx512())
    info += "; float32 ones from " + std::to_string(MKL_ROWS) + " rows on by torch";
  return info;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, library) {
  library.impl("lora_linear_fwd", TORCH_BOX(&peft_kernels::lora_linear_fwd));
  library.impl("lora_linear_bwd", TORCH_BOX(&peft_kernels::lora_linear_bwd));
}

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, library) { library.def("native_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CompositeExplicitAutograd, library) {
  library.impl("native_info", TORCH_BOX(&peft_kernels::native_info));
}
