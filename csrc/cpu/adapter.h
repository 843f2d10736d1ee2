// The two passes of a bottleneck adapter on the CPU, one build of each per instruction set.
#pragma once
#include "matrix/matrix.h"

namespace peft_kernels {

enum class Activation { identity, relu, leaky_relu, gelu, gelu_tanh, silu, tanh, sigmoid };

struct AdapterNorm {
  const float *weight, *bias;  // [n]; weight is null where there is no LayerNorm, bias may be null
  float eps;
};

struct AdapterInputs {
  Matrix x;                                    // [m, k]
  const Matrix* residual;                      // [m, n] besides x, or null
  Matrix down, up;                             // [r, k], [n, r]
  const float *down_bias, *up_bias, *scale;    // [r], [n], [n]; biases may be null
  AdapterNorm pre_norm, norm;                  // of x, of the sum
  Activation activation;
  bool adds_x;
  const Dropout* dropout;  // on the update; null for none
};

struct AdapterForward {
  AdapterInputs in;
  Matrix y;           // [m, n], contiguous
  float* z;           // [m, r]
  float* statistics;  // [m, 2 x LayerNorms]
};

// All but dy, z and statistics are outputs, and null where they aren't wanted.
struct AdapterBackward {
  AdapterInputs in;
  Matrix dy;
  const float *z, *statistics;
  const Matrix *dx, *dt;              // [m, k], [m, n], contiguous
  const Matrix *d_down, *d_down_bias; // [r, k], [1, r]
  const Matrix *up, *up_sum;          // G [n, r], g0 [1, n]
  const Matrix *d_pre_norm, *d_norm;  // [2, k], [2, n]
};

struct AdapterKernels {
  void (*forward)(const AdapterForward&, const Parallel&);
  void (*backward)(const AdapterBackward&, const Parallel&);
};

extern const AdapterKernels adapter_baseline;
extern const AdapterKernels adapter_avx2;
extern const AdapterKernels adapter_avx512;

}  // namespace peft_kernels
