// What the torch side of several ops reads from its options.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>

#include "../common.h"
#include "adapter.h"

namespace peft_kernels {

// A factor that is a number, or a tensor of one element where there is one.
inline float scale_of(double scale, const std::optional<Tensor>& scale_t) {
  return scale_t ? read_scalar<float>(*scale_t, "scale_t") : static_cast<float>(scale);
}

inline std::optional<Dropout> dropout_of(double p, const std::optional<Tensor>& seed) {
  if (!seed) return std::nullopt;
  const double threshold = std::min(std::nearbyint(p * 4294967296.0), 4294967295.0);
  return Dropout{static_cast<uint64_t>(read_scalar<int64_t>(*seed, "seed")),
                 static_cast<uint32_t>(threshold), static_cast<float>(1.0 / (1.0 - p))};
}

inline Activation activation_of(const std::string& name) {
  constexpr std::array names{"identity",  "relu", "leaky_relu", "gelu",
                             "gelu_tanh", "silu", "tanh",       "sigmoid"};
  const auto found = std::find(names.begin(), names.end(), name);
  STD_TORCH_CHECK(found != names.end(), "activation is unknown: ", name);
  return static_cast<Activation>(found - names.begin());
}

}  // namespace peft_kernels
