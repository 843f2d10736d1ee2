// The forms of sweep.h for products of pairs (pairs.h).
#pragma once
#include "pairs.h"
#include "sweep_lanes.h"

#if defined(__AVX512F__)
namespace peft_kernels::PK_ISA {

constexpr int64_t PACKED_PAIRS = 128 * 1024;  // words: a thread's packed rows stay in its L2

// A block of rows of X as panels of pairs, and of Z as panels of floats.
struct PackedPairs {
  int64_t row, rows;
  const Word* x;
  const float* z;
};

inline void pack_pairs(const Sweep& s, int64_t row, int64_t rows, bool wants_s, Word* x, float* z) {
  const int64_t d = s.x.cols, pairs = d / 2;
  const Matrix words{s.x.at(row, 0), DType::f32, rows, pairs, s.x.row_stride / 2, 1};
  const Scratch floats(s.projection ? d * LANES : 0);
  for (int64_t i = 0; i < rows; i += LANES) {
    const int64_t lanes = std::min<int64_t>(LANES, rows - i);
    pack(words.transposed(), 0, pairs, i, lanes, reinterpret_cast<float*>(x + i * pairs));
    if (!s.projection) {
      pack({s.z, DType::f32, s.r, s.x.rows, 1, s.r}, 0, s.r, row + i, lanes, z + i * s.r);
      continue;
    }
    pack(s.x.transposed(), 0, d, row + i, lanes, floats);
    project_panel(s, row + i, lanes, floats, wants_s, z + i * s.r);
  }
}

// Columns [col, end) of out for packed rows; they are rows of the weight, rounded a few at a time.
inline void sweep_packed_pairs(const Sweep& s, const PackedPairs& packed, int64_t col,
                               int64_t end) {
  const int64_t d = s.x.cols, pairs = d / 2;
  const Scratch words(ROWS * pairs), buffer(ROWS * s.r);
  auto* rounded = reinterpret_cast<BFloat16*>(static_cast<float*>(words));
  const Matrix h_rows = s.h.transposed();
  for (int64_t j = col; j < end; j += ROWS)
    with_rows(end - j, [&](auto R) {
      for (int a = 0; a < R; a++) round_codes(*s.codes, (j + a) * d, d, rounded + a * d);
      const PairRows g{reinterpret_cast<const Word*>(rounded), pairs};
      const Rows h = float_rows(h_rows, j, R, 0, s.r, buffer);
      for (int64_t i = 0; i < packed.rows; i += LANES) {
        Vec tile[ROWS][VECS];
        for (int a = 0; a < R; a++)
          for (int v = 0; v < VECS; v++) tile[a][v] = splat(s.gain ? 0 : bias_at(s, j + a));
        accumulate<R>(s.r, h, packed.z + i * s.r, LANES, tile);
        accumulate_pairs<R>(pairs, g, packed.x + i * pairs, tile);
        if (s.gain)
          for (int a = 0; a < R; a++)
            for (int v = 0; v < VECS; v++)
              tile[a][v] = tile[a][v] * splat(s.gain[j + a]) + splat(bias_at(s, j + a));
        const int64_t lanes = std::min<int64_t>(LANES, packed.rows - i);
        store_transposed<R>(s.out, packed.row + i, j, lanes, tile);
      }
    });
}

// Lanes are rows of X: y = x W^T.
inline void sweep_pairs_rows(const Sweep& s, const Parallel& parallel) {
  const int64_t m = s.x.rows, c = s.out.cols, pairs = s.x.cols / 2;
  const int64_t units = round_up(m, LANES) / LANES, columns = round_up(c, ROWS) / ROWS;
  const int64_t wanted = std::max<int64_t>(MIN_ROWS, PACKED_PAIRS / std::max<int64_t>(pairs, 1));
  const int64_t block = std::min(round_up(wanted, LANES), units * LANES);
  const int64_t groups = row_groups(m, parallel.threads, block), splits = parallel.threads / groups;
  parallel(groups * splits, [&](int64_t task) {
    const int64_t group = task / splits, split = task % splits;
    const int64_t end = std::min(m, units * (group + 1) / groups * LANES);
    const int64_t col = columns * split / splits * ROWS;
    const int64_t col_end = std::min(c, columns * (split + 1) / splits * ROWS);
    const Scratch x(block * pairs), z(block * s.r);
    auto* words = reinterpret_cast<Word*>(static_cast<float*>(x));
    for (int64_t row = units * group / groups * LANES; row < end; row += block) {
      const int64_t rows = std::min(block, end - row);
      pack_pairs(s, row, rows, split == 0, words, z);
      sweep_packed_pairs(s, {row, rows, words, z}, col, col_end);
    }
  });
}

// One strip of columns of the form below.
inline void sweep_pairs_strip(const Sweep& s, int64_t col, Word* g_panels, float* h_panels) {
  const int64_t pairs = s.x.cols / 2, cols = std::min(COLUMN_PANELS * LANES, s.out.cols - col);
  pack_code_pairs(*s.codes, pairs, col, cols, g_panels);
  pack(s.h, 0, s.r, col, cols, h_panels);
  for (int64_t i = 0; i < s.x.rows; i += ROWS)
    with_rows(s.x.rows - i, [&](auto R) {
      alignas(64) float factors[ROWS][COLUMN_PANELS * LANES], values[LANES];
      if (s.dropout)
        for (int a = 0; a < R; a++) dropout_factors(*s.dropout, i + a, col, cols, factors[a]);
      for (int64_t j = 0; j < cols; j += LANES) {
        const int64_t lanes = std::min<int64_t>(LANES, cols - j);
        Vec tile[ROWS][VECS]{};
        accumulate<R>(s.r, {s.z + i * s.r, s.r, 1}, h_panels + j * s.r, LANES, tile);
        if (s.dropout)
          for (int a = 0; a < R; a++)
            for (int v = 0; v < VECS; v++) tile[a][v] *= load(&factors[a][j + v * V]);
        accumulate_pairs<R>(pairs, pairs_of(s.x, i), g_panels + j * pairs, tile);
        for (int a = 0; a < R; a++) {
          for (int v = 0; v < VECS; v++) store(values + v * V, tile[a][v]);
          end_sums(s, col + j, lanes, values);
          store_row(s.out, i + a, col + j, values, lanes);
        }
      }
    });
}

// Lanes are columns of the weight: dx = dy W, with rows of dy where they lie.
inline void sweep_pairs_columns(const Sweep& s, const Parallel& parallel) {
  const int64_t width = COLUMN_PANELS * LANES, strips = round_up(s.out.cols, width) / width;
  const int64_t tasks = std::min<int64_t>(parallel.threads, strips);
  parallel(tasks, [&](int64_t task) {
    const Scratch g(width * s.x.cols / 2), h(width * s.r);
    for (int64_t strip = strips * task / tasks; strip < strips * (task + 1) / tasks; strip++)
      sweep_pairs_strip(s, strip * width, reinterpret_cast<Word*>(static_cast<float*>(g)), h);
  });
}

}  // namespace peft_kernels::PK_ISA
#endif
