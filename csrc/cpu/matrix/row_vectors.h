// Loops over rows of floats by vectors, of which the last may be there only in part.
#pragma once
#include "simd.h"

namespace peft_kernels::PK_ISA {

struct Whole {};
struct Part {
  int64_t count;
};

PK_INLINE Vec load(const float* p, Whole) { return load(p); }
PK_INLINE Vec load(const float* p, Part part) {  // 0 in the lanes beyond
  Vec v{};
  std::memcpy(&v, p, part.count * sizeof(float));
  return v;
}

PK_INLINE void store(float* p, Vec v, Whole) { store(p, v); }
PK_INLINE void store(float* p, Vec v, Part part) { std::memcpy(p, &v, part.count * sizeof(float)); }

// Sets the lanes beyond to 0.
PK_INLINE Vec keep(Vec v, Whole) { return v; }
PK_INLINE Vec keep(Vec v, Part part) { return load(reinterpret_cast<const float*>(&v), part); }

// Calls f(j, lanes) for the vectors of count floats.
template <class F>
PK_INLINE void by_vectors(int64_t count, F f) {
  int64_t j = 0;
  for (; j + V <= count; j += V) f(j, Whole{});
  if (j < count) f(j, Part{count - j});
}

}  // namespace peft_kernels::PK_ISA
