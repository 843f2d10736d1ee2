// The two passes of AdapterFusion on the CPU, one build of each per instruction set.
#pragma once
#include "adapter.h"
#include "matrix/matrix.h"

namespace peft_kernels {

// R is the sum of the N sizes.
struct FusionInputs {
  Matrix x;                          // [m, k]
  const Matrix* query;               // [m, d]; null where it is x
  Matrix down_weight, score_weight;  // [R, k], [R + N, d]
  Matrix down_bias, score_bias;      // [1, R], [1, R + N]
  Matrix mix_weight, mix_bias;       // [n, R], [N, n]
  const int64_t* sizes;              // [N]
  int64_t adapters;                  // N
  Activation activation;

  PK_INLINE const Matrix& queries() const { return query ? *query : x; }
};

struct AdapterFusionForward {
  FusionInputs in;
  const Matrix* residual;  // [m, n], or null
  Matrix y;                // [m, n]
  Matrix z, w, p;          // [m, R], [m, R + N], [m, N], contiguous float32
};

// Null where no gradient is wanted.
struct AdapterFusionBackward {
  FusionInputs in;
  Matrix dy, z, w, p;
  const Matrix *dx, *dq;              // [m, k], [m, d]
  const Matrix *d_down, *d_score;     // [R, k], [R + N, d]; all that follow are float32
  float *d_down_bias, *d_score_bias;  // [R], [R + N]
  const Matrix *d_mix, *d_mix_bias;   // [n, R], [N, n]
};

struct AdapterFusionKernels {
  void (*forward)(const AdapterFusionForward&, const Parallel&);
  void (*backward)(const AdapterFusionBackward&, const Parallel&);
};

extern const AdapterFusionKernels adapter_fusion_baseline;
extern const AdapterFusionKernels adapter_fusion_avx2;
extern const AdapterFusionKernels adapter_fusion_avx512;

}  // namespace peft_kernels
