#include "isa.h"

#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

namespace peft_kernels {
namespace {

std::string asked_isa() {
  const char* variable = std::getenv("PEFT_KERNELS_ISA");
  const std::string asked = variable ? variable : "";
  STD_TORCH_CHECK(asked.empty() || asked == "baseline" || asked == "avx2" || asked == "avx512",
                  "PEFT_KERNELS_ISA must be baseline, avx2 or avx512; got ", asked);
  return asked;
}

// What this processor has, and the environment doesn't forbid.
Isa widest() {
  [[maybe_unused]] const std::string asked = asked_isa();
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (asked.empty() || asked == "avx512")) return Isa::avx512;
  if (avx2 && asked != "baseline") return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
#if defined(__x86_64__)
  // Intel's servers have twice the multipliers at 512 bits. Zen 4 has the same number, and the
  // larger tile wastes more on small shapes: measured 0.9 to 1.9 times the time of AVX2.
  if (widest() == Isa::avx512 && asked_isa().empty() && !__builtin_cpu_is("intel"))
    return Isa::avx2;
#endif
  return widest();
}

}  // namespace

bool isa_is_asked() { return !asked_isa().empty(); }

Isa widest_isa() {
  static const Isa isa = widest();
  return isa;
}

bool multiplies_bf16() {
#if defined(__x86_64__)
  static const bool does = widest_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return does;
#else
  return false;
#endif
}

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace peft_kernels
