// Philox 4x32-10 (Salmon et al. 2011), V / 2 counters at a time: the words of every backend.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace peft_kernels::PK_ISA {

constexpr int COUNTERS = V / 2;          // a word to 64 bits, as its products have them
constexpr int DRAWN = 4 * COUNTERS;      // words at a time
typedef uint64_t WideVec __attribute__((vector_size(COUNTERS * 8)));
static_assert(DRAWN == 2 * V);

// a times the low half of each.
PK_INLINE WideVec multiply(uint32_t a, WideVec b) {
#if defined(__AVX512F__)
  return (WideVec)_mm512_mul_epu32((__m512i)b, _mm512_set1_epi64(a));
#elif defined(__AVX2__)
  return (WideVec)_mm256_mul_epu32((__m256i)b, _mm256_set1_epi64x(a));
#elif defined(__SSE2__)
  return (WideVec)_mm_mul_epu32((__m128i)b, _mm_set1_epi64x(a));
#else
  return (b & 0xffffffffu) * uint64_t(a);
#endif
}

// The four words of each counter (c0, row, 0, 0), in the low halves; the high ones hold anything.
PK_INLINE void philox(uint64_t seed, WideVec c0, uint64_t row, WideVec (&words)[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  WideVec c1 = WideVec{} + uint32_t(row), c2{}, c3{};
  for (int round = 0; round < 10; round++) {
    const WideVec product0 = multiply(0xD2511F53u, c0), product1 = multiply(0xCD9E8D57u, c2);
    c0 = (product1 >> 32) ^ c1 ^ k0;
    c2 = (product0 >> 32) ^ c3 ^ k1;
    c1 = product1, c3 = product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// The words of one counter after those of another.
PK_INLINE void in_order(const WideVec (&words)[4], WordVec& first, WordVec& second) {
  const WideVec low01 = (words[0] & 0xffffffffu) | (words[1] << 32);
  const WideVec low23 = (words[2] & 0xffffffffu) | (words[3] << 32);
#if defined(__AVX512F__)
  const __m512i even = _mm512_unpacklo_epi64((__m512i)low01, (__m512i)low23);
  const __m512i odd = _mm512_unpackhi_epi64((__m512i)low01, (__m512i)low23);
  const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  first = (WordVec)_mm512_permutex2var_epi64(even, front, odd);
  second = (WordVec)_mm512_permutex2var_epi64(even, back, odd);
#elif defined(__AVX2__)
  const __m256i even = _mm256_unpacklo_epi64((__m256i)low01, (__m256i)low23);
  const __m256i odd = _mm256_unpackhi_epi64((__m256i)low01, (__m256i)low23);
  first = (WordVec)_mm256_permute2x128_si256(even, odd, 0x20);
  second = (WordVec)_mm256_permute2x128_si256(even, odd, 0x31);
#else
  first = (WordVec)WideVec{low01[0], low23[0]};
  second = (WordVec)WideVec{low01[1], low23[1]};
#endif
}

PK_INLINE Vec factors_of(const Dropout& d, WordVec words) {
  return (Vec)((WordVec)(words >= d.threshold) & (WordVec)splat(d.keep_scale));
}

// factors[j - col] = 0 where element (row, j) is dropped, else 1 / (1 - p), for count columns.
inline void dropout_factors(const Dropout& d, int64_t row, int64_t col, int64_t count,
                            float* factors) {
  WideVec lane;
  for (int i = 0; i < COUNTERS; i++) lane[i] = i;
  const int64_t end = col + count;
  for (int64_t j = col / 4 * 4; j < end; j += DRAWN) {
    WideVec words[4];
    WordVec first, second;
    philox(d.seed, lane + uint64_t(j / 4), row, words);
    in_order(words, first, second);
    if (j >= col && j + DRAWN <= end) {
      store(factors + j - col, factors_of(d, first));
      store(factors + j - col + V, factors_of(d, second));
      continue;
    }
    alignas(64) float drawn[DRAWN];
    store(drawn, factors_of(d, first));
    store(drawn + V, factors_of(d, second));
    const int64_t begin = std::max(j, col), stop = std::min(j + DRAWN, end);
    std::memcpy(factors + begin - col, drawn + begin - j, (stop - begin) * sizeof(float));
  }
}

}  // namespace peft_kernels::PK_ISA
