// What a gain on the columns of y = gain z + bias adds to the backward, from one read of dy and y:
//
//     dz[m, n]  = gain dy
//     dgain[n]  = sum_m dy z      with z = (y - bias) / gain
//
// Each thread owns a range of columns, so that every sum has one order. A gain of 0 has lost its z,
// which is computed anew for that column alone: z = x W_j + scale S B_j.
#pragma once
#include "lora_linear.h"
#include "matrix/row_sums.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t GAIN_COLUMNS = 512;  // of dy and y: each row of them is 2 KB of floats

inline float value_at(const Matrix& m, int64_t row, int64_t col) {
  float value = 0;
  with_type(m.dtype, m.at(row, col), [&](auto* from) { value = widen(*from); });
  return value;
}

// sum_m dy z of a column whose gain is 0.
inline float dgain_of_zero(const GainBackward& g, int64_t col) {
  const int64_t k = g.x.cols, r = g.lora_b.cols;
  double total = 0;
  for (int64_t i = 0; i < g.dy.rows; i++) {
    double z = 0, low_rank = 0;
    for (int64_t p = 0; p < k; p++)
      z += double(value_at(g.x, i, p)) * value_at(g.weight, col, p);
    for (int64_t q = 0; q < r; q++)
      low_rank += double(g.s[i * r + q]) * value_at(g.lora_b, col, q);
    total += (z + g.scale * low_rank) * value_at(g.dy, i, col);
  }
  return static_cast<float>(total);
}

// Columns [col, col + count): dz, and sums += dy (y - bias) of some rows.
inline void gain_rows(const GainBackward& g, int64_t row, int64_t rows, int64_t col, int64_t count,
                      const float* bias, float* sums) {
  alignas(64) float dy[GAIN_COLUMNS], y[GAIN_COLUMNS];
  for (int64_t i = row; i < row + rows; i++) {
    with_type(g.dy.dtype, g.dy.at(i, col), [&](auto* from) { widen_row(from, dy, count); });
    if (sums) {
      with_type(g.y.dtype, g.y.at(i, col), [&](auto* from) { widen_row(from, y, count); });
      for (int64_t j = 0; j < count; j++) sums[j] += dy[j] * (y[j] - bias[j]);
    }
    for (int64_t j = 0; j < count; j++) dy[j] *= g.gain[col + j];
    store_row(g.dz, i, col, dy, count);
  }
}

inline void gain_columns(const GainBackward& g, int64_t col, int64_t count) {
  const int64_t m = g.dy.rows;
  alignas(64) float bias[GAIN_COLUMNS]{}, sums[GAIN_COLUMNS]{};
  for (int64_t j = 0; g.bias && j < count; j++) bias[j] = value_at(*g.bias, 0, col + j);
  RowSums totals(g.dgain ? g.dgain + col : nullptr, count, m);
  for (int64_t row = 0; row < m; row += RUN) {
    const int64_t rows = std::min(RUN, m - row);
    gain_rows(g, row, rows, col, count, bias, g.dgain ? sums : nullptr);
    if (g.dgain) end_run(count, sums, totals.next());
    totals.end_block(rows);
  }
  totals.finish();
  for (int64_t j = col; g.dgain && j < col + count; j++)
    g.dgain[j] = g.gain[j] == 0 ? dgain_of_zero(g, j) : g.dgain[j] / g.gain[j];
}

inline void gain_backward(const GainBackward& g, const Parallel& parallel) {
  const int64_t n = g.dy.cols, each = round_up((n + parallel.threads - 1) / parallel.threads, LANES);
  const int64_t width = std::min(GAIN_COLUMNS, std::max<int64_t>(each, LANES));
  parallel((n + width - 1) / width, [&](int64_t block) {
    gain_columns(g, block * width, std::min(width, n - block * width));
  });
}

}  // namespace peft_kernels::PK_ISA
