// LoRA linear on tensors, as the ops made of it call it.
#pragma once
#include <optional>
#include <tuple>

#include "../common.h"
#include "lora_linear.h"
#include "matrix/isa.h"
#include "options.h"

namespace peft_kernels {

const LoRALinearKernels& lora_linear_kernels();  // the build for this processor
const LoRALinearKernels& lora_linear_kernels(Isa isa);

// A bias [n] as a matrix of one row.
std::optional<Matrix> bias_row(const std::optional<Tensor>& bias, int64_t n);

// y = gain (x W^T + scale S B^T) + bias and S; gain is [n] floats, or null for 1.
std::tuple<Tensor, Tensor> lora_linear_with_gain(Tensor x, Tensor weight,
                                                 std::optional<Tensor> bias, const float* gain,
                                                 Tensor lora_a, Tensor lora_b, double scale,
                                                 std::optional<Tensor> scale_t, double dropout_p,
                                                 std::optional<Tensor> seed);

// dx, dA and dB, of size 0 where not needed.
std::tuple<Tensor, Tensor, Tensor> lora_linear_bwd(Tensor dy, Tensor x, Tensor weight,
                                                   Tensor lora_a, Tensor lora_b, Tensor s,
                                                   double scale, std::optional<Tensor> scale_t,
                                                   double dropout_p, std::optional<Tensor> seed,
                                                   bool needs_x, bool needs_a, bool needs_b);

}  // namespace peft_kernels
