// The activation-sized product, base and low-rank part accumulated in the same registers:
//
//     out[m, c] = gain * (X G + F * (Z H)) + bias      X [m, d], G [d, c], Z [m, r], H [r, c]
//
// F holds the dropout factors (or is 1), gain one factor a column (or is 1). The forward is X = x,
// G = W^T, Z = scale S, H = B^T; the backward to x is X = dy, G = W, Z = dS, H = A. Each element of
// out is stored once. G's layout chooses the form: with d contiguous the vector lanes are rows of
// X, with c contiguous they are columns of G, so a weight is never transposed; with few rows
// nothing is packed, and bfloat16 with a weight in codes goes by pairs if the processor has those.
#pragma once
#include "few_pairs.h"
#include "sweep_lanes.h"
#include "sweep_pairs.h"

namespace peft_kernels::PK_ISA {

inline void sweep(const Sweep& s, const Parallel& parallel) {
  const int64_t m = s.x.rows;
  if (m == 0) return;
  const bool rows_contiguous =
      s.codes ? s.transposed : s.g.row_stride == 1 && s.g.col_stride != 1;
  if (s.has_base) {
    if (s.projection) project_rows(s, parallel);
    return add_low_rank(s, parallel);
  }
#if defined(__AVX512F__)
  if (m > FEW_ROWS_DOT && is_of_pairs(s))
    return s.transposed ? sweep_pairs_rows(s, parallel) : sweep_pairs_columns(s, parallel);
#endif
  if (rows_contiguous && !s.dropout) {
    const bool dot = !s.uniform && m <= FEW_ROWS_DOT && s.h.row_stride == 1;
#if defined(__AVX512F__)
    if (dot && is_of_few_pairs(s)) return sweep_few_pairs(s, parallel);
#endif
    if (dot) return sweep_few_dot(s, parallel);
    if (!s.codes || m <= WIDENED_AGAIN) return sweep_rows_as_lanes(s, parallel);
  }
  if (!rows_contiguous && !s.uniform && m <= FEW_ROWS_AXPY) return sweep_few_axpy(s, parallel);
  sweep_columns_as_lanes(s, parallel);
}

}  // namespace peft_kernels::PK_ISA
