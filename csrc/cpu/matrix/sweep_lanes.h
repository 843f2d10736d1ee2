// The forms of the product (sweep.h) whose vector lanes are rows of X or columns of G.
#pragma once
#include "low_rank.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t PACKED_X = 128 * 1024;  // floats: a thread's packed rows stay in its L2
constexpr int64_t COLUMN_PANELS = 4;      // packed at once: 256 bytes of each row of G
constexpr int64_t DRAWN_COLUMNS = 128;    // of dropout's factors: a panel's rows of them stay in L1
constexpr int64_t WIDENED_AGAIN = 128;    // rows of X up to which codes are widened by each block
constexpr int64_t WIDENED_ROWS = 256;     // of 16-bit X, so that a strip of G is packed seldom

// out(row + j, col + i) = tile[i][j] for R x lanes elements; floats go through B x B transposes.
template <int R>
PK_INLINE void store_transposed(const Matrix& out, int64_t row, int64_t col, int64_t lanes,
                                const Vec (&tile)[ROWS][VECS]) {
  alignas(64) float values[(R + B - 1) / B * B][LANES];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < VECS; v++) store(&values[i][v * V], tile[i][v]);
  if (out.dtype == DType::f32 && out.col_stride == 1) {
    for (int j = 0; j < lanes; j += B)
      for (int i = 0; i < R; i += B) {
        Block columns[B];
        for (int b = 0; b < B; b++) columns[b] = load_block(&values[i + b][j]);
        transpose(columns);
        for (int b = 0; b < std::min<int64_t>(B, lanes - j); b++)
          std::memcpy(out.at(row + j + b, col + i), &columns[b], std::min(B, R - i) * 4);
      }
    return;
  }
  with_type(out.dtype, out.at(row, col), [&](auto* to) {
    for (int64_t j = 0; j < lanes; j++)
      for (int i = 0; i < R; i++) narrow(values[i][j], to + j * out.row_stride + i * out.col_stride);
  });
}

// A packed panel of X under dropout: the factors are drawn by rows, and packed as X was.
inline void drop_panel(const Dropout& dropout, int64_t row, int64_t lanes, int64_t d,
                       const float* x_panel, float* dropped) {
  const Scratch factors(LANES * DRAWN_COLUMNS);
  for (int64_t col = 0; col < d; col += DRAWN_COLUMNS) {
    const int64_t cols = std::min(DRAWN_COLUMNS, d - col);
    for (int64_t j = 0; j < lanes; j++)
      dropout_factors(dropout, row + j, col, cols, factors + j * DRAWN_COLUMNS);
    float* to = dropped + col * LANES;
    pack({factors, DType::f32, cols, lanes, 1, DRAWN_COLUMNS}, 0, cols, 0, lanes, to);
    for (int64_t i = 0; i < cols * LANES; i++) to[i] *= x_panel[col * LANES + i];
  }
}

// S for the rows of one packed panel of X, if s is wanted, and Z = scale S as a panel, if that is.
inline void project_panel(const Sweep& s, int64_t row, int64_t lanes, const float* x_panel,
                          bool wants_s, float* z_panel) {
  const Projection& p = *s.projection;
  const int64_t d = s.x.cols;
  const Scratch dropped(p.dropout ? d * LANES : 0), a_buffer(ROWS * d);
  if (p.dropout) {
    drop_panel(*p.dropout, row, lanes, d, x_panel, dropped);
    x_panel = dropped;
  }
  const Matrix out{p.s, DType::f32, s.x.rows, s.r, s.r, 1};
  for (int64_t q = 0; q < s.r; q += ROWS)
    with_rows(s.r - q, [&](auto R) {
      Vec tile[ROWS][VECS]{};
      accumulate<R>(d, float_rows(p.a, q, R, 0, d, a_buffer), x_panel, LANES, tile);
      if (wants_s) store_transposed<R>(out, row, q, lanes, tile);
      if (!z_panel) return;
      for (int i = 0; i < R; i++)
        for (int v = 0; v < VECS; v++)
          store(z_panel + (q + i) * LANES + v * V, tile[i][v] * p.scale);
    });
}

// S and Z for all rows.
inline void project_rows(const Sweep& s, const Parallel& parallel) {
  const int64_t m = s.x.rows, d = s.x.cols;
  parallel(round_up(m, LANES) / LANES, [&](int64_t p) {
    const Scratch panel(d * LANES);
    const int64_t row = p * LANES, lanes = std::min<int64_t>(LANES, m - row);
    pack(s.x.transposed(), 0, d, row, lanes, panel);
    project_panel(s, row, lanes, panel, true, nullptr);
    for (int64_t i = row * s.r; i < (row + lanes) * s.r; i++)
      s.z[i] = s.projection->scale * s.projection->s[i];
  });
}

inline Rows widened_rows(const Codes& codes, int64_t row, int64_t rows, float* buffer) {
  const int64_t d = codes.cols;
  for (int64_t i = 0; i < rows; i++) widen_codes(codes, (row + i) * d, d, buffer + i * d);
  return {buffer, d, 1};
}

// A range of columns for a block of rows that is packed as panels of X's lanes, then Z's.
inline void sweep_packed(const Sweep& s, int64_t row, int64_t rows, int64_t col, int64_t end,
                         const float* panels, float* buffer) {
  const int64_t d = s.x.cols, panel = (d + s.r) * LANES;
  const Matrix g_rows = s.g.transposed(), h_rows = s.h.transposed();
  for (int64_t j = col; j < end; j += ROWS)
    with_rows(end - j, [&](auto R) {
      const Rows g = s.codes ? widened_rows(*s.codes, j, R, buffer)
                             : float_rows(g_rows, j, R, 0, d, buffer);
      const Rows h = float_rows(h_rows, j, R, 0, s.r, buffer + ROWS * d);
      for (int64_t i = 0; i < rows; i += LANES) {
        const float* x = panels + i / LANES * panel;
        Vec tile[ROWS][VECS];
        for (int a = 0; a < R; a++)
          for (int v = 0; v < VECS; v++) tile[a][v] = splat(s.gain ? 0 : bias_at(s, j + a));
        accumulate<R>(d, g, x, LANES, tile);
        accumulate<R>(s.r, h, x + d * LANES, LANES, tile);
        if (s.gain)
          for (int a = 0; a < R; a++)
            for (int v = 0; v < VECS; v++)
              tile[a][v] = tile[a][v] * splat(s.gain[j + a]) + splat(bias_at(s, j + a));
        store_transposed<R>(s.out, row + i, j, std::min<int64_t>(LANES, rows - i), tile);
      }
    });
}

// Lanes are rows of X. Each thread packs its own rows, as lines another core has read are dear to
// write: packing into a buffer that two cores of Zen 4 read took 2.6 times as long. G and H are
// broadcast from where they lie.
inline void sweep_rows_as_lanes(const Sweep& s, const Parallel& parallel) {
  const int64_t m = s.x.rows, d = s.x.cols, c = s.out.cols, panel = (d + s.r) * LANES;
  const int64_t row_units = round_up(m, LANES) / LANES, column_units = round_up(c, ROWS) / ROWS;
  const int64_t wanted = std::max<int64_t>(MIN_ROWS, PACKED_X / std::max<int64_t>(d, 1));
  const int64_t block = std::min(round_up(wanted, LANES), row_units * LANES);
  // Each group widens all codes for each of its blocks: groups of less than one would do so more.
  const int64_t groups = row_groups(m, parallel.threads, s.codes ? block : MIN_ROWS);
  const int64_t splits = std::clamp<int64_t>(parallel.threads / groups, 1, column_units + 1);
  const Matrix x_columns = s.x.transposed(), z_columns{s.z, DType::f32, s.r, m, 1, s.r};
  parallel(groups * splits, [&](int64_t task) {
    const int64_t group = task / splits, split = task % splits;
    const int64_t row_end = std::min(m, row_units * (group + 1) / groups * LANES);
    const int64_t col = column_units * split / splits * ROWS;
    const int64_t col_end = std::min(c, column_units * (split + 1) / splits * ROWS);
    const Scratch panels(block / LANES * panel), buffer(ROWS * (d + s.r));
    for (int64_t row = row_units * group / groups * LANES; row < row_end; row += block) {
      const int64_t rows = std::min(block, row_end - row);
      for (int64_t i = 0; i < rows; i += LANES) {
        float* x = panels + i / LANES * panel;
        const int64_t lanes = std::min<int64_t>(LANES, rows - i);
        pack(x_columns, 0, d, row + i, lanes, x);
        if (s.projection)
          project_panel(s, row + i, lanes, x, split == 0, x + d * LANES);
        else
          pack(z_columns, 0, s.r, row + i, lanes, x + d * LANES);
      }
      sweep_packed(s, row, rows, col, col_end, panels, buffer);
      if (s.finish) s.finish->run(s.finish->context, row, row + rows, col, col_end);
    }
  });
}

inline void pack_g(const Sweep& s, int64_t col, int64_t cols, float* panels) {
  if (!s.codes) return pack(s.g, 0, s.x.cols, col, cols, panels);
  if (s.transposed) return pack_code_rows(*s.codes, col, cols, panels);
  pack_code_columns(*s.codes, s.x.cols, col, cols, panels);
}

// One strip of columns of the form below, for rows [row, row + x.rows) of out.
inline void sweep_column_strip(const Sweep& s, const Matrix& x, int64_t row, int64_t col,
                               float* buffer) {
  const int64_t d = x.cols, cols = std::min(COLUMN_PANELS * LANES, s.out.cols - col);
  const int64_t panels = round_up(cols, LANES) / LANES;
  float* g_panels = buffer;
  float* h_panels = g_panels + COLUMN_PANELS * LANES * d;
  pack_g(s, col, cols, g_panels);
  pack(s.h, 0, s.r, col, cols, h_panels);
  for (int64_t i = 0; i < x.rows; i += ROWS)
    with_rows(x.rows - i, [&](auto R) {
      alignas(64) float factors[ROWS][COLUMN_PANELS * LANES], values[COLUMN_PANELS * LANES];
      if (s.dropout)
        for (int a = 0; a < R; a++) dropout_factors(*s.dropout, row + i + a, col, cols, factors[a]);
      const Rows z{s.z + (row + i) * s.r, s.r, 1}, rows = float_rows(x, i, R, 0, d, nullptr);
      for (int64_t p = 0; p < panels; p++) {
        const int64_t j = p * LANES, lanes = std::min<int64_t>(LANES, cols - j);
        Vec tile[ROWS][VECS]{};
        accumulate<R>(s.r, z, h_panels + j * s.r, LANES, tile);
        if (s.dropout)
          for (int a = 0; a < R; a++)
            for (int v = 0; v < VECS; v++) tile[a][v] *= load(&factors[a][j + v * V]);
        accumulate<R>(d, rows, g_panels + j * d, LANES, tile);
        for (int a = 0; a < R; a++) {
          for (int v = 0; v < VECS; v++) store(values + v * V, tile[a][v]);
          end_sums(s, col + j, lanes, values);
          store_row(s.out, row + i + a, col + j, values, lanes);
        }
      }
    });
}

// Lanes are columns of G, packed strip by strip; X is broadcast from where it lies, or from a block
// of rows widened to float.
inline void sweep_columns_as_lanes(const Sweep& s, const Parallel& parallel) {
  const int64_t m = s.x.rows, d = s.x.cols, width = COLUMN_PANELS * LANES;
  const bool in_place = s.x.dtype == DType::f32;
  const int64_t block = in_place ? m : std::min(m, WIDENED_ROWS);
  const Scratch widened(in_place ? 0 : block * d);
  const int64_t strips = round_up(s.out.cols, width) / width;
  const int64_t tasks = std::min<int64_t>(parallel.threads, strips);
  if (s.projection) project_rows(s, parallel);
  for (int64_t row = 0; row < m; row += block) {
    const int64_t rows = std::min(block, m - row);
    Matrix x{s.x.at(row, 0), s.x.dtype, rows, d, s.x.row_stride, s.x.col_stride};
    if (!in_place) {
      parallel(rows, [&](int64_t i) { float_rows(s.x, row + i, 1, 0, d, widened + i * d); });
      x = {widened, DType::f32, rows, d, d, 1};
    }
    parallel(tasks, [&](int64_t task) {
      const Scratch buffer(width * (d + s.r));
      const int64_t end = strips * (task + 1) / tasks;
      for (int64_t strip = strips * task / tasks; strip < end; strip++)
        sweep_column_strip(s, x, row, strip * width, buffer);
      const int64_t col = strips * task / tasks * width, col_end = std::min(s.out.cols, end * width);
      if (s.finish) s.finish->run(s.finish->context, row, row + rows, col, col_end);
    });
  }
}

}  // namespace peft_kernels::PK_ISA
