// Registers DoRA linear for the CPU key: LoRA linear's kernels, with a gain. The maths is in
// ops/dora_linear.py.
#include "lora_linear_op.h"

namespace peft_kernels {
namespace {

const float* gain_of(const Tensor& gain, int64_t n) {
  STD_TORCH_CHECK(gain.dim() == 1 && gain.size(0) == n, "gain must be [n]");
  STD_TORCH_CHECK(gain.is_contiguous() && gain.scalar_type() == ScalarType::Float,
                  "gain must be contiguous float32");
  return gain.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor> dora_linear_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                           Tensor lora_a, Tensor lora_b, Tensor gain, double scale,
                                           std::optional<Tensor> scale_t, double dropout_p,
                                           std::optional<Tensor> seed) {
  return lora_linear_with_gain(x, weight, bias, gain_of(gain, weight.size(0)), lora_a, lora_b,
                               scale, scale_t, dropout_p, seed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dora_linear_bwd(
    Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
    Tensor gain, Tensor y, Tensor s, double scale, std::optional<Tensor> scale_t, double dropout_p,
    std::optional<Tensor> seed, bool needs_x, bool needs_a, bool needs_b, bool needs_gain) {
  const int64_t m = x.size(0), n = weight.size(0);
  STD_TORCH_CHECK(dy.size(0) == m && dy.size(1) == n, "dy must be [m, n]");
  STD_TORCH_CHECK(y.size(0) == m && y.size(1) == n, "y must be [m, n]");
  STD_TORCH_CHECK(s.is_contiguous() && s.scalar_type() == ScalarType::Float, "s must be float32");
  dy = with_unit_stride(dy, true), y = with_unit_stride(y, true);
  Tensor dz = torch::stable::new_empty(dy, {m, n});
  Tensor dgain = torch::stable::new_empty(gain, {needs_gain ? n : 0});
  const std::optional<Matrix> row = bias_row(bias, n);
  lora_linear_kernels().gain_backward({.dy = matrix_of(dy, "dy"),
                                       .y = matrix_of(y, "y"),
                                       .x = matrix_of(x, "x"),
                                       .weight = matrix_of(weight, "weight"),
                                       .lora_b = matrix_of(lora_b, "lora_b"),
                                       .bias = row ? &*row : nullptr,
                                       .s = s.const_data_ptr<float>(),
                                       .scale = scale_of(scale, scale_t),
                                       .gain = gain_of(gain, n),
                                       .dz = matrix_of(dz, "dz"),
                                       .dgain = needs_gain ? dgain.mutable_data_ptr<float>() : nullptr},
                                      torch_threads());
  const auto [dx, da, db] = lora_linear_bwd(dz, x, weight, lora_a, lora_b, s, scale, scale_t,
                                            dropout_p, seed, needs_x, needs_a, needs_b);
  return {dx, da, db, dgain};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, library) {
  library.impl("dora_linear_fwd", TORCH_BOX(&peft_kernels::dora_linear_fwd));
  library.impl("dora_linear_bwd", TORCH_BOX(&peft_kernels::dora_linear_bwd));
}
