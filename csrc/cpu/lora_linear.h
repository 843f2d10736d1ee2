// The two passes of LoRA linear on the CPU, one build of each per instruction set.
#pragma once
#include "matrix/matrix.h"

namespace peft_kernels {

struct LoRALinearForward {
  Matrix x, weight, lora_a, lora_b;  // [m, k], [n, k], [r, k], [n, r]
  const Codes* codes;                // the weight, whose matrix has no data then; or null
  const Matrix* bias;                // [1, n], or null
  const float* gain;                 // [n], the factors of all but the bias; null for 1
  const Dropout* dropout;            // null for none
  float scale;
  Matrix y;                          // [m, n]
  bool has_base;                     // y holds x W^T already
  float* s;                          // [m, r]: dropout(x) A^T
};

struct LoRALinearBackward {
  Matrix dy, x, weight, lora_a, lora_b;
  const Codes* codes;
  const float* s;
  const Dropout* dropout;
  float scale;
  const Matrix *dx, *da, *db;  // null where no gradient is wanted
  bool has_base;               // dx holds dy W already
};

// What a gain on y adds to the backward, before the rest: dz = gain dy, and its own gradient.
struct GainBackward {
  Matrix dy, y, x, weight, lora_b;  // y = gain z + bias with z = x W^T + scale S B^T
  const Matrix* bias;               // [1, n], or null
  const float* s;
  float scale;
  const float* gain;  // [n]
  Matrix dz;          // [m, n]
  float* dgain;       // [n], or null where it isn't wanted
};

struct LoRALinearKernels {
  const char* isa;
  void (*forward)(const LoRALinearForward&, const Parallel&);
  void (*backward)(const LoRALinearBackward&, const Parallel&);
  void (*gain_backward)(const GainBackward&, const Parallel&);
};

extern const LoRALinearKernels lora_linear_baseline;
extern const LoRALinearKernels lora_linear_avx2;
extern const LoRALinearKernels lora_linear_avx512;

}  // namespace peft_kernels
