// LoRA linear and DoRA linear on the CPU, built once per instruction set; the maths is in
// ops/lora_linear.py and ops/dora_linear.py.
#include "lora_linear.h"

#include "gain.h"
#include "matrix/rank_products.h"
#include "matrix/sweep.h"

namespace peft_kernels {
namespace PK_ISA {

void lora_linear_fwd(const LoRALinearForward& f, const Parallel& parallel) {
  const int64_t m = f.x.rows, r = f.lora_a.rows;
  // 1. S = dropout(x) A^T and Z = scale S, from the panels of x that 2 reads
  const Scratch z(m * r);
  const Projection projection{f.lora_a, f.dropout, f.scale, f.s};
  // 2. y = gain (x W^T + Z B^T) + b
  sweep({.x = f.x,
         .g = f.weight.transposed(),
         .codes = f.codes,
         .transposed = true,
         .projection = &projection,
         .z = z,
         .h = f.lora_b.transposed(),
         .r = r,
         .bias = f.bias,
         .gain = f.gain,
         .out = f.y,
         .has_base = f.has_base},
        parallel);
}

void lora_linear_bwd(const LoRALinearBackward& b, const Parallel& parallel) {
  const int64_t m = b.x.rows, r = b.lora_a.rows;
  const bool needs_ds = b.dx || b.da;
  const Scratch ds(m * r);
  // 1. dS = scale dy B and dB = scale dy^T S, from one read of dy
  const Matrix db_t = b.db ? b.db->transposed() : Matrix{};
  if (needs_ds || b.db)
    rank_products({.x = b.dy,
                   .h = needs_ds ? &b.lora_b : nullptr,
                   .z = ds,
                   .z_scale = b.scale,
                   .u = b.s,
                   .o_scale = b.scale,
                   .o = b.db ? &db_t : nullptr,
                   .r = r},
                  parallel);
  // 2. dA = dS^T dropout(x)
  if (b.da)
    rank_products(
        {.x = b.x, .dropout = b.dropout, .u = ds, .o_scale = 1, .o = b.da, .r = r}, parallel);
  // 3. dx = dy W + dropout'(dS A)
  if (b.dx)
    sweep({.x = b.dy,
           .g = b.weight,
           .codes = b.codes,
           .z = ds,
           .h = b.lora_a,
           .r = r,
           .dropout = b.dropout,
           .out = *b.dx,
           .has_base = b.has_base},
          parallel);
}

}  // namespace PK_ISA

#define PK_CONCAT_(a, b) a##b
#define PK_CONCAT(a, b) PK_CONCAT_(a, b)
#define PK_STRING_(a) #a
#define PK_STRING(a) PK_STRING_(a)

const LoRALinearKernels PK_CONCAT(lora_linear_, PK_ISA) = {
    PK_STRING(PK_ISA), PK_ISA::lora_linear_fwd, PK_ISA::lora_linear_bwd,
    PK_ISA::gain_backward};

}  // namespace peft_kernels
