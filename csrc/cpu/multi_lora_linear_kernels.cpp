// Multi-LoRA linear on the CPU, built once per instruction set; the maths is in
// ops/multi_lora_linear.py.
#include "multi_lora_linear.h"

#include "paged_shrink.h"
#include "matrix/sweep.h"

namespace peft_kernels {
namespace PK_ISA {

void multi_lora_base(const Base& b, const Parallel& parallel) {
  const Matrix no_rank{b.g.data, DType::f32, 0, b.g.cols, 0, 0};
  const Finish finish{&b, [](const void* context, int64_t row, int64_t row_end, int64_t col,
                             int64_t col_end) {
    const Base& base = *static_cast<const Base*>(context);
    for (int64_t i = 0; i < base.expand_count; i++)
      expand_region(base.expands[i], row, row_end, col, col_end);
  }};
  sweep({.x = b.x,
         .g = b.g,
         .h = no_rank,
         .bias = b.bias,
         .out = b.out,
         .uniform = true,
         .finish = &finish},
        parallel);
}

void multi_lora_narrow(FloatRows from, const Matrix& to, const Parallel& parallel) {
  parallel(to.rows, [&](int64_t i) { store_row(to, i, 0, from.data + i * from.stride, to.cols); });
}

}  // namespace PK_ISA

#define PK_CONCAT_(a, b) a##b
#define PK_CONCAT(a, b) PK_CONCAT_(a, b)

const MultiLoRALinearKernels PK_CONCAT(multi_lora_linear_, PK_ISA) = {
    PK_ISA::multi_lora_base, PK_ISA::shrink, PK_ISA::expand, PK_ISA::update, PK_ISA::outer,
    PK_ISA::multi_lora_narrow};

}  // namespace peft_kernels
