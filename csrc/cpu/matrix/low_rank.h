// The rest of a product whose base X G lies in out already: out = gain * (out + F * (Z H)) + bias.
#pragma once
#include "few_rows.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t MIN_ROWS = 32;      // fewest that are worth a thread's reading all columns
constexpr int64_t STRIP = 4 * LANES;  // columns whose dropout factors are drawn at once

// How the threads share [m, c]: groups of rows, as long as each has `least`, by groups of columns.
inline int64_t row_groups(int64_t m, int64_t threads, int64_t least = MIN_ROWS) {
  int64_t groups = std::clamp<int64_t>(m / least, 1, threads);
  while (threads % groups) groups--;
  return groups;
}

// to[j] += values[j].
template <class T>
PK_INLINE void add_to_row(const float* values, int64_t count, T* to) {
  alignas(64) float sums[LANES];
  widen_row(to, sums, count);
  for (int64_t j = 0; j < count; j++) sums[j] += values[j];
  narrow_row(sums, to, count);
}

// to[j] = gain[j] * (to[j] + values[j]) + bias[j].
template <class T>
PK_INLINE void add_to_row(const float* values, const float* gain, const float* bias, int64_t count,
                          T* to) {
  alignas(64) float sums[LANES];
  widen_row(to, sums, count);
  for (int64_t j = 0; j < count; j++) sums[j] = gain[j] * (sums[j] + values[j]) + bias[j];
  narrow_row(sums, to, count);
}

// R rows of one panel, columns [col, col + count); bias is those columns', and so are the factors,
// a strip apart from row to row.
template <int R>
PK_INLINE void add_low_rank_tile(const Sweep& s, int64_t row, int64_t col, int64_t count,
                                 const float* h_panel, const float* bias, const float* factors) {
  alignas(64) float values[LANES];
  Vec tile[ROWS][VECS]{};
  accumulate<R>(s.r, {s.z + row * s.r, s.r, 1}, h_panel, LANES, tile);
  for (int i = 0; i < R; i++) {
    if (s.dropout)
      for (int v = 0; v < VECS; v++) tile[i][v] *= load(factors + i * STRIP + v * V);
    for (int v = 0; v < VECS; v++)
      store(values + v * V, s.gain ? tile[i][v] : tile[i][v] + load(bias + v * V));
    with_type(s.out.dtype, s.out.at(row + i, col), [&](auto* to) {
      if (s.gain) return add_to_row(values, s.gain + col, bias, count, to);
      if (count == LANES) return add_to_row(values, LANES, to);  // a count the compiler knows
      add_to_row(values, count, to);
    });
  }
}

// R rows of out from the column at which the strip begins.
template <int R>
PK_INLINE void add_low_rank_strip(const Sweep& s, int64_t row, int64_t col, const float* h_panels,
                                  const float* bias) {
  alignas(64) float factors[ROWS][STRIP];
  const int64_t end = std::min(s.out.cols, col + STRIP);
  if (s.dropout)
    for (int i = 0; i < R; i++) dropout_factors(*s.dropout, row + i, col, end - col, factors[i]);
  for (int64_t j = col; j < end; j += LANES)
    add_low_rank_tile<R>(s, row, j, std::min<int64_t>(LANES, end - j), h_panels + j * s.r, bias + j,
                         factors[0] + (j - col));
}

// Each row of out, whose columns are contiguous, is read and written once, in the order it lies.
inline void add_low_rank(const Sweep& s, const Parallel& parallel) {
  const int64_t m = s.out.rows, c = s.out.cols, panels = round_up(c, LANES) / LANES;
  const int64_t groups = row_groups(m, parallel.threads), splits = parallel.threads / groups;
  const int64_t strips = round_up(c, STRIP) / STRIP;
  const Scratch h_panels(panels * LANES * s.r), bias(panels * LANES);
  parallel(panels, [&](int64_t p) {
    const int64_t col = p * LANES, count = std::min<int64_t>(LANES, c - col);
    pack(s.h, 0, s.r, col, count, h_panels + col * s.r);
    for (int64_t j = 0; j < LANES; j++) bias[col + j] = j < count ? bias_at(s, col + j) : 0;
  });
  parallel(groups * splits, [&](int64_t task) {
    const int64_t group = task / splits, split = task % splits, end = m * (group + 1) / groups;
    for (int64_t row = m * group / groups; row < end; row += ROWS)
      with_rows(end - row, [&](auto R) {
        for (int64_t i = strips * split / splits; i < strips * (split + 1) / splits; i++)
          add_low_rank_strip<R>(s, row, i * STRIP, h_panels, bias);
      });
  });
}

}  // namespace peft_kernels::PK_ISA
