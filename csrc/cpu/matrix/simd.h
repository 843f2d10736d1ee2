// Vectors of floats, and loads and stores that convert from and to half precision.
// Compiled once per instruction set: PK_ISA names the namespace, compiler flags choose the width.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#else
#include <torch/headeronly/util/Half.h>
#endif

#include "matrix.h"

namespace peft_kernels::PK_ISA {

#if defined(__AVX512F__)
constexpr int V = 16;
#elif defined(__AVX2__)
constexpr int V = 8;
#else
constexpr int V = 4;
#endif
constexpr int B = V < 8 ? V : 8;  // transposes go by B x B blocks

typedef float Vec __attribute__((vector_size(V * 4)));
typedef float LooseVec __attribute__((vector_size(V * 4), aligned(4)));
typedef float Block __attribute__((vector_size(B * 4)));
typedef float LooseBlock __attribute__((vector_size(B * 4), aligned(4)));
typedef uint32_t WordVec __attribute__((vector_size(V * 4)));

PK_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
PK_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
PK_INLINE Vec splat(float f) { return f - Vec{}; }

struct Float {
  float value;
};
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

PK_INLINE float widen(Float x) { return x.value; }
PK_INLINE float widen(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

PK_INLINE void narrow(float f, Float* out) { out->value = f; }
PK_INLINE void narrow(float f, BFloat16* out) {  // to nearest even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(f == f ? rounded : (bits >> 16) | 0x40);
}

PK_INLINE Vec load(const Float* p) { return load(&p->value); }
PK_INLINE Block load_block(const float* p) { return *reinterpret_cast<const LooseBlock*>(p); }
PK_INLINE Block load_block(const Float* p) { return load_block(&p->value); }

#if defined(__AVX2__)
PK_INLINE float widen(Half x) { return _cvtsh_ss(x.bits); }
PK_INLINE void narrow(float f, Half* out) { out->bits = _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
PK_INLINE Block load_block(const Half* p) {
  return (Block)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PK_INLINE Block load_block(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Block)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
}
#else
PK_INLINE float widen(Half x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }
PK_INLINE void narrow(float f, Half* out) { out->bits = c10::detail::fp16_ieee_from_fp32_value(f); }
template <class T>
PK_INLINE Block load_block(const T* p) {
  Block v;
  for (int i = 0; i < B; i++) v[i] = widen(p[i]);
  return v;
}
#endif

#if defined(__AVX512F__)
PK_INLINE Vec load(const Half* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PK_INLINE Vec load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
#else
PK_INLINE Vec load(const Half* p) { return load_block(p); }
PK_INLINE Vec load(const BFloat16* p) { return load_block(p); }
#endif

// V bytes as words, and words as floats.
#if defined(__AVX512F__)
PK_INLINE WordVec bytes(const uint8_t* from) {
  return (WordVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
PK_INLINE WordVec signed_bytes(const uint8_t* from) {
  return (WordVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
PK_INLINE Vec floats(WordVec words) { return (Vec)_mm512_cvtepi32_ps((__m512i)words); }
#elif defined(__AVX2__)
PK_INLINE WordVec bytes(const uint8_t* from) {
  return (WordVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
PK_INLINE WordVec signed_bytes(const uint8_t* from) {
  return (WordVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
PK_INLINE Vec floats(WordVec words) { return (Vec)_mm256_cvtepi32_ps((__m256i)words); }
#else
PK_INLINE WordVec bytes(const uint8_t* from) {
  WordVec words;
  for (int i = 0; i < V; i++) words[i] = from[i];
  return words;
}
PK_INLINE WordVec signed_bytes(const uint8_t* from) {
  WordVec words;
  for (int i = 0; i < V; i++) words[i] = static_cast<uint32_t>(static_cast<int8_t>(from[i]));
  return words;
}
PK_INLINE Vec floats(WordVec words) {
  Vec values;
  for (int i = 0; i < V; i++) values[i] = static_cast<float>(static_cast<int32_t>(words[i]));
  return values;
}
#endif

// By halves.
template <int N>
PK_INLINE float sum_of(const float* values) {
  if constexpr (N == 1) {
    return *values;
  } else {
    typedef float Part __attribute__((vector_size(N * 2)));
    Part low, high;
    std::memcpy(&low, values, sizeof low);
    std::memcpy(&high, values + N / 2, sizeof high);
    const Part halves = low + high;
    return sum_of<N / 2>(reinterpret_cast<const float*>(&halves));
  }
}

PK_INLINE float sum(Vec v) { return sum_of<V>(reinterpret_cast<const float*>(&v)); }

typedef float Four __attribute__((vector_size(16)));
typedef float LooseFour __attribute__((vector_size(16), aligned(4)));

// v by halves, until four are left.
template <int N = V>
PK_INLINE Four four_of(const float* values) {
  if constexpr (N == 4) {
    return *reinterpret_cast<const LooseFour*>(values);
  } else {
    typedef float Part __attribute__((vector_size(N * 2)));
    Part low, high;
    std::memcpy(&low, values, sizeof low);
    std::memcpy(&high, values + N / 2, sizeof high);
    const Part halves = low + high;
    return four_of<N / 2>(reinterpret_cast<const float*>(&halves));
  }
}

PK_INLINE Four four_of(Vec v) { return four_of(reinterpret_cast<const float*>(&v)); }

// The sum of each, to the bits of sum().
PK_INLINE Four sums_of(Vec a, Vec b, Vec c, Vec d) {
  typedef int32_t Lanes __attribute__((vector_size(16)));
  const Four parts[4] = {four_of(a), four_of(b), four_of(c), four_of(d)};
  Four pairs[2];
  for (int i = 0; i < 2; i++) {
    const Four first = parts[2 * i], second = parts[2 * i + 1];
    pairs[i] = __builtin_shuffle(first, second, Lanes{0, 1, 4, 5}) +
               __builtin_shuffle(first, second, Lanes{2, 3, 6, 7});
  }
  return __builtin_shuffle(pairs[0], pairs[1], Lanes{0, 2, 4, 6}) +
         __builtin_shuffle(pairs[0], pairs[1], Lanes{1, 3, 5, 7});
}

// Calls f with a pointer of the type that dtype names.
template <class F>
PK_INLINE void with_type(DType dtype, void* data, F f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<Float*>(data));
    case DType::f16: return f(static_cast<Half*>(data));
    case DType::bf16: return f(static_cast<BFloat16*>(data));
  }
}

template <class T>
PK_INLINE void widen_row(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + V <= count; i += V) store(to + i, load(from + i));
  for (; i < count; i++) to[i] = widen(from[i]);
}

template <class T>
PK_INLINE void narrow_row(const float* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(from[i], to + i);
}

#if defined(__AVX2__)
PK_INLINE void narrow_row(const float* from, Half* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  for (; i < count; i++) narrow(from[i], to + i);
}

// As words of 32 bits.
PK_INLINE __m256i narrowed(__m256 f) {
  const __m256i bits = _mm256_castps_si256(f), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256 is_nan = _mm256_cmp_ps(f, f, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(is_nan));
}

PK_INLINE void narrow_row(const float* from, BFloat16* to, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i low = narrowed(_mm256_loadu_ps(from + i));
    const __m256i high = narrowed(_mm256_loadu_ps(from + i + 8));
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), both);
  }
  for (; i < count; i++) narrow(from[i], to + i);
}
#endif

// to[0...V) = v, rounded once.
PK_INLINE void store(Float* to, Vec v) { store(&to->value, v); }
#if defined(__AVX512F__)
PK_INLINE void store(Half* to, Vec v) {
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}
PK_INLINE void store(BFloat16* to, Vec v) {
  const __m512i bits = (__m512i)v, high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(all));
}
#elif defined(__AVX2__)
PK_INLINE void store(Half* to, Vec v) {
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
}
PK_INLINE void store(BFloat16* to, Vec v) {
  const __m256i words = narrowed((__m256)v);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#else
template <class T>
PK_INLINE void store(T* to, Vec v) {
  for (int i = 0; i < V; i++) narrow(v[i], to + i);
}
#endif

}  // namespace peft_kernels::PK_ISA
