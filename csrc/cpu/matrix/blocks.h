// Weights in the blocks of GGUF files, widened to floats: each has its codes and its scales together.
// The layouts are in ops/_gguf_blocks.py. All are widened 32 elements at a time.
#pragma once
#include "tile.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t PIECE = 32;

inline bool is_in_blocks(const Codes& c) { return c.layout >= Layout::q8_0; }

PK_INLINE float half_at(const uint8_t* from) {
  Half half;
  std::memcpy(&half, from, 2);
  return widen(half);
}

template <class T>
PK_INLINE void scaled(const T* codes, int64_t count, float scale, float shift, float* to) {
  for (int64_t i = 0; i < count; i++) to[i] = codes[i] * scale + shift;
}

// 16 bytes of two codes each: the low halves first.
PK_INLINE void scaled_halves(const uint8_t* bytes, float scale, float shift, float* to) {
  for (int64_t i = 0; i < 16; i++) to[i] = (bytes[i] & 15) * scale + shift;
  for (int64_t i = 0; i < 16; i++) to[16 + i] = (bytes[i] >> 4) * scale + shift;
}

// The 6 bits of scale j of a block of q4_K and those of its minimum, of 8 each in 12 bytes.
struct ScaleAndMinimum {
  int scale, minimum;
};
PK_INLINE ScaleAndMinimum of_q4_K(const uint8_t* from, int64_t j) {
  if (j < 4) return {from[j] & 63, from[j + 4] & 63};
  return {(from[j + 4] & 15) | (from[j - 4] >> 6) << 4, from[j + 4] >> 4 | (from[j] >> 6) << 4};
}

PK_INLINE void widen_q4_K(const uint8_t* block, int64_t piece, float* to) {
  const auto [scale, minimum] = of_q4_K(block + 4, piece);
  const float d = half_at(block) * scale, shift = -(half_at(block + 2) * minimum);
  const uint8_t* bytes = block + 16 + piece / 2 * PIECE;
  const int by = piece % 2 * 4;
  for (int64_t i = 0; i < PIECE; i++) to[i] = (bytes[i] >> by & 15) * d + shift;
}

PK_INLINE void widen_q6_K(const uint8_t* block, int64_t piece, float* to) {
  const int64_t half = piece / 4, quarter = piece % 4;
  const uint8_t *low = block + 64 * half + quarter % 2 * PIECE, *high = block + 128 + PIECE * half;
  const auto* scales = reinterpret_cast<const int8_t*>(block + 192) + 2 * piece;
  const float d = half_at(block + 208);
  const int by = quarter / 2 * 4, high_by = static_cast<int>(2 * quarter);
  for (int64_t part = 0; part < 2; part++) {
    const float scale = d * scales[part];
    for (int64_t i = 16 * part; i < 16 * part + 16; i++)
      to[i] = ((low[i] >> by & 15) + (high[i] >> high_by & 3) * 16 - 32) * scale;
  }
}

inline void widen_piece(Layout layout, const uint8_t* data, int64_t piece, float* to) {
  switch (layout) {
    case Layout::q8_0:
      data += piece * 34;
      return scaled(reinterpret_cast<const int8_t*>(data) + 2, PIECE, half_at(data), 0, to);
    case Layout::q4_0: {
      data += piece * 18;
      const float scale = half_at(data);
      return scaled_halves(data + 2, scale, -8 * scale, to);
    }
    case Layout::q4_1:
      data += piece * 20;
      return scaled_halves(data + 4, half_at(data), half_at(data + 2), to);
    case Layout::q4_K: return widen_q4_K(data + piece / 8 * 144, piece % 8, to);
    default: return widen_q6_K(data + piece / 8 * 210, piece % 8, to);
  }
}

// to[i] = element first + i, counted row by row.
inline void widen_blocks(const Codes& c, int64_t first, int64_t count, float* to) {
  float part[PIECE];
  for (int64_t i = 0; i < count;) {
    const int64_t piece = (first + i) / PIECE, from = (first + i) % PIECE;
    const int64_t run = std::min(count - i, PIECE - from);
    widen_piece(c.layout, c.data, piece, run == PIECE ? to + i : part);
    if (run < PIECE) std::memcpy(to + i, part + from, run * sizeof(float));
    i += run;
  }
}

}  // namespace peft_kernels::PK_ISA
