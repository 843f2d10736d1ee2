// Registers LoRA linear over a weight in codes for the CPU key; the formats are in
// ops/_quantized.py.
#include <optional>
#include <tuple>

#include "lora_linear_op.h"
#include "quantized.h"

namespace peft_kernels {
namespace {

// Up to 8 rows looking up codes is all there is: AVX-512 does 16 at once, which took 0.45 to 0.9 of
// AVX2's time on Zen 4, too. Beyond, the build that is best for products.
const LoRALinearKernels& kernels_for(const Tensor& x) {
  const bool in_pairs = x.scalar_type() == ScalarType::BFloat16 && multiplies_bf16();
  return lora_linear_kernels(x.size(0) <= 8 || in_pairs ? widest_isa() : chosen_isa());
}

Matrix without_data(int64_t n, int64_t k) { return {nullptr, DType::f32, n, k, k, 1}; }

void check_shapes(const Tensor& x, int64_t n, const Tensor& lora_a, const Tensor& lora_b) {
  STD_TORCH_CHECK(lora_a.size(1) == x.size(1), "lora_a must be [r, k] for x [m, k]");
  STD_TORCH_CHECK(lora_b.size(0) == n && lora_b.size(1) == lora_a.size(0),
                  "lora_b must be [n, r] for a weight [n, k] and lora_a [r, k]");
}

std::tuple<Tensor, Tensor> lora_linear_codes(
    Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> shifts, std::optional<Tensor> book,
    std::optional<Tensor> nested_scales, std::optional<Tensor> nested_book,
    std::optional<Tensor> nested_offset, int64_t n, int64_t block, int64_t block_rows,
    int64_t nested_block, double unit, std::string layout, std::optional<Tensor> bias,
    Tensor lora_a, Tensor lora_b, double scale, std::optional<Tensor> scale_t, double dropout_p,
    std::optional<Tensor> seed) {
  check_shapes(x, n, lora_a, lora_b);
  x = with_unit_stride(x, true);
  lora_a = with_unit_stride(lora_a, true), lora_b = with_unit_stride(lora_b, true);
  const int64_t m = x.size(0), k = x.size(1), r = lora_a.size(0);
  const Codes weight = codes_of({codes, scales, shifts, book, nested_scales, nested_book,
                                 nested_offset, n, block, block_rows, nested_block, unit, layout},
                                k);
  Tensor y = torch::stable::new_empty(x, {m, n});
  Tensor s = torch::stable::new_empty(x, {m, r}, ScalarType::Float);
  const auto dropout = dropout_of(dropout_p, seed);
  const std::optional<Matrix> row = bias_row(bias, n);
  kernels_for(x).forward({.x = matrix_of(x, "x"),
                          .weight = without_data(n, k),
                          .lora_a = matrix_of(lora_a, "lora_a"),
                          .lora_b = matrix_of(lora_b, "lora_b"),
                          .codes = &weight,
                          .bias = row ? &*row : nullptr,
                          .dropout = dropout ? &*dropout : nullptr,
                          .scale = scale_of(scale, scale_t),
                          .y = matrix_of(y, "y"),
                          .s = s.mutable_data_ptr<float>()},
                         torch_threads());
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_codes_bwd(
    Tensor dy, Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> shifts,
    std::optional<Tensor> book, std::optional<Tensor> nested_scales,
    std::optional<Tensor> nested_book, std::optional<Tensor> nested_offset, int64_t n,
    int64_t block, int64_t block_rows, int64_t nested_block, double unit, std::string layout,
    Tensor lora_a, Tensor lora_b, Tensor s, double scale, std::optional<Tensor> scale_t, double dropout_p,
    std::optional<Tensor> seed, bool needs_x, bool needs_a, bool needs_b) {
  check_shapes(x, n, lora_a, lora_b);
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.size(1) == n, "dy must be [m, n]");
  STD_TORCH_CHECK(s.is_contiguous() && s.scalar_type() == ScalarType::Float, "s must be float32");
  STD_TORCH_CHECK(s.size(0) == x.size(0) && s.size(1) == lora_a.size(0), "s must be [m, r]");
  x = with_unit_stride(x, true), dy = with_unit_stride(dy, true);
  lora_a = with_unit_stride(lora_a, true), lora_b = with_unit_stride(lora_b, true);
  const int64_t k = x.size(1);
  const Codes weight = codes_of({codes, scales, shifts, book, nested_scales, nested_book,
                                 nested_offset, n, block, block_rows, nested_block, unit, layout},
                                k);
  const auto shaped = [](const Tensor& like, bool needed) {
    if (!needed) return torch::stable::new_empty(like, {0});
    return torch::stable::new_empty(like, {like.size(0), like.size(1)});
  };
  Tensor dx = shaped(x, needs_x), da = shaped(lora_a, needs_a), db = shaped(lora_b, needs_b);
  std::optional<Matrix> dx_out, da_out, db_out;
  if (needs_x) dx_out = matrix_of(dx, "dx");
  if (needs_a) da_out = matrix_of(da, "da");
  if (needs_b) db_out = matrix_of(db, "db");
  const auto dropout = dropout_of(dropout_p, seed);
  kernels_for(x).backward({.dy = matrix_of(dy, "dy"),
                                   .x = matrix_of(x, "x"),
                                   .weight = without_data(n, k),
                                   .lora_a = matrix_of(lora_a, "lora_a"),
                                   .lora_b = matrix_of(lora_b, "lora_b"),
                                   .codes = &weight,
                                   .s = s.const_data_ptr<float>(),
                                   .dropout = dropout ? &*dropout : nullptr,
                                   .scale = scale_of(scale, scale_t),
                                   .dx = dx_out ? &*dx_out : nullptr,
                                   .da = da_out ? &*da_out : nullptr,
                                   .db = db_out ? &*db_out : nullptr},
                                  torch_threads());
  return {dx, da, db};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, library) {
  library.impl("lora_linear_codes", TORCH_BOX(&peft_kernels::lora_linear_codes));
  library.impl("lora_linear_codes_bwd", TORCH_BOX(&peft_kernels::lora_linear_codes_bwd));
}
