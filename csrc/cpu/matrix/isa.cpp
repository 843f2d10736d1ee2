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

Isa choose() {
  [[maybe_unused]] const std::string asked = asked_isa();
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  // Intel's servers have twice the multipliers at 512 bits. Zen 4 has the same number, and the
  // larger tile wastes more on small shapes: measured 0.9 to 1.9 times the time of AVX2.
  if (avx512 && (asked == "avx512" || (asked.empty() && __builtin_cpu_is("intel"))))
    return Isa::avx512;
  if (avx2 && asked != "baseline") return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace

bool isa_is_asked() { return !asked_isa().empty(); }

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace peft_kernels
