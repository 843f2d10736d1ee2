// Which of the builds for several instruction sets runs here.
#pragma once

namespace peft_kernels {

enum class Isa { baseline, avx2, avx512 };

// PEFT_KERNELS_ISA asks for one build, and for it alone: torch multiplies nothing then.
bool isa_is_asked();

// The build for this processor. Where it can't run the one asked for, the next smaller one serves.
Isa chosen_isa();
Isa widest_isa();  // for what a wider vector does more of in one instruction
bool multiplies_bf16();  // whether that build runs here and the processor has AVX512-BF16

}  // namespace peft_kernels
