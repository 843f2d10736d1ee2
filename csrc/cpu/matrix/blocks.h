// Weights in the blocks of GGUF files, widened to floats: each has its codes and its scales
// together. The layouts are in ops/_gguf_blocks.py. All are widened 32 elements at a time.
#pragma once
#include "tile.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t PIECE = 32;
constexpr int64_t MAX_BLOCK = 256;  // elements
constexpr int PIECE_VECS = PIECE / V;

inline bool is_in_blocks(const Codes& c) { return c.layout >= Layout::q8_0; }

PK_INLINE float half_at(const uint8_t* from) {
  Half half;
  std::memcpy(&half, from, 2);
  return widen(half);
}

// 16 bytes of two codes each: the low halves first.
PK_INLINE void read_halves(const uint8_t* from, float scale, float shift, Vec (&to)[PIECE_VECS]) {
  for (int v = 0; v < PIECE_VECS / 2; v++) {
    const WordVec both = bytes(from + v * V);
    to[v] = floats(both & 15) * scale + shift;
    to[PIECE_VECS / 2 + v] = floats(both >> 4) * scale + shift;
  }
}

// The 6 bits of scale j of a block of q4_K and those of its minimum, of 8 each in 12 bytes.
struct ScaleAndMinimum {
  int scale, minimum;
};
PK_INLINE ScaleAndMinimum of_q4_K(const uint8_t* from, int64_t j) {
  if (j < 4) return {from[j] & 63, from[j + 4] & 63};
  return {(from[j + 4] & 15) | (from[j - 4] >> 6) << 4, from[j + 4] >> 4 | (from[j] >> 6) << 4};
}

PK_INLINE void read_q4_K(const uint8_t* block, int64_t piece, Vec (&to)[PIECE_VECS]) {
  const auto [scale, minimum] = of_q4_K(block + 4, piece);
  const float d = half_at(block) * scale, shift = -(half_at(block + 2) * minimum);
  const uint8_t* from = block + 16 + piece / 2 * PIECE;
  const int by = piece % 2 * 4;
  for (int v = 0; v < PIECE_VECS; v++) to[v] = floats(bytes(from + v * V) >> by & 15) * d + shift;
}

PK_INLINE void read_q6_K(const uint8_t* block, int64_t piece, Vec (&to)[PIECE_VECS]) {
  const int64_t half = piece / 4, quarter = piece % 4;
  const uint8_t *low = block + 64 * half + quarter % 2 * PIECE, *high = block + 128 + PIECE * half;
  const auto* scales = reinterpret_cast<const int8_t*>(block + 192) + 2 * piece;
  const float d = half_at(block + 208);
  const int by = quarter / 2 * 4, high_by = static_cast<int>(2 * quarter);
  for (int v = 0; v < PIECE_VECS; v++) {
    const WordVec four = bytes(low + v * V) >> by & 15, two = bytes(high + v * V) >> high_by & 3;
    to[v] = (floats(four | two << 4) - 32) * (d * scales[2 * v / PIECE_VECS]);
  }
}

// The elements of a piece, in their order.
template <Layout L>
PK_INLINE void read_piece(const uint8_t* data, int64_t piece, Vec (&to)[PIECE_VECS]) {
  if constexpr (L == Layout::q8_0) {
    data += piece * 34;
    const float scale = half_at(data);
    for (int v = 0; v < PIECE_VECS; v++) to[v] = floats(signed_bytes(data + 2 + v * V)) * scale;
  } else if constexpr (L == Layout::q4_0) {
    data += piece * 18;
    const float scale = half_at(data);
    read_halves(data + 2, scale, -8 * scale, to);
  } else if constexpr (L == Layout::q4_1) {
    data += piece * 20;
    read_halves(data + 4, half_at(data), half_at(data + 2), to);
  } else if constexpr (L == Layout::q4_K) {
    read_q4_K(data + piece / 8 * 144, piece % 8, to);
  } else {
    static_assert(L == Layout::q6_K);
    read_q6_K(data + piece / 8 * 210, piece % 8, to);
  }
}

template <Layout L>
inline void widen_blocks(const Codes& c, int64_t first, int64_t count, float* to) {
  float part[PIECE];
  for (int64_t i = 0; i < count;) {
    const int64_t from = (first + i) % PIECE, run = std::min(count - i, PIECE - from);
    Vec values[PIECE_VECS];
    read_piece<L>(c.data, (first + i) / PIECE, values);
    float* out = run == PIECE ? to + i : part;
    for (int v = 0; v < PIECE_VECS; v++) store(out + v * V, values[v]);
    if (run < PIECE) std::memcpy(to + i, part + from, run * sizeof(float));
    i += run;
  }
}

// to[i] = element first + i, counted row by row.
inline void widen_blocks(const Codes& c, int64_t first, int64_t count, float* to) {
  switch (c.layout) {
    case Layout::q8_0: return widen_blocks<Layout::q8_0>(c, first, count, to);
    case Layout::q4_0: return widen_blocks<Layout::q4_0>(c, first, count, to);
    case Layout::q4_1: return widen_blocks<Layout::q4_1>(c, first, count, to);
    case Layout::q4_K: return widen_blocks<Layout::q4_K>(c, first, count, to);
    default: return widen_blocks<Layout::q6_K>(c, first, count, to);
  }
}

}  // namespace peft_kernels::PK_ISA
