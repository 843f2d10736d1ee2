// Philox 4x32-10 (Salmon et al. 2011), V counters at a time: the same words as in every backend.
#pragma once
#include "simd.h"

namespace peft_kernels::PK_ISA {

PK_INLINE void multiply(uint32_t a, WordVec b, WordVec& high, WordVec& low) {
  typedef uint64_t Wide __attribute__((vector_size(V * 8)));
  const Wide product = __builtin_convertvector(b, Wide) * uint64_t(a);
  high = __builtin_convertvector(product >> 32, WordVec);
  low = __builtin_convertvector(product, WordVec);
}

PK_INLINE void philox(uint64_t seed, WordVec c0, uint64_t row, WordVec (&words)[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  WordVec c1 = WordVec{} + uint32_t(row), c2{}, c3{};
  for (int round = 0; round < 10; round++) {
    WordVec high0, low0, high1, low1;
    multiply(0xD2511F53u, c0, high0, low0);
    multiply(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// factors[j - col] = 0 where element (row, j) is dropped, else 1 / (1 - p), for count columns.
inline void dropout_factors(const Dropout& d, int64_t row, int64_t col, int64_t count,
                            float* factors) {
  WordVec lane;
  for (int i = 0; i < V; i++) lane[i] = i;
  const int64_t end = col + count;
  for (int64_t group = col / 4; group * 4 < end; group += V) {
    WordVec words[4];
    philox(d.seed, lane + uint32_t(group), row, words);
    for (int g = 0; g < V; g++)
      for (int w = 0; w < 4; w++) {
        const int64_t j = (group + g) * 4 + w;
        if (j >= col && j < end) factors[j - col] = words[w][g] < d.threshold ? 0 : d.keep_scale;
      }
  }
}

}  // namespace peft_kernels::PK_ISA
