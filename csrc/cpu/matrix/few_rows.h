// The activation-sized product for a few rows, where reading G is the whole cost: G is read once,
// in the order it lies in memory, converted in registers and never packed.
#pragma once
#include "codes.h"
#include "philox.h"

namespace peft_kernels::PK_ISA {

// Fills Z first: S = dropout(X) A^T, Z = scale S.
struct Projection {
  Matrix a;                // [r, d], rows contiguous
  const Dropout* dropout;  // null for none
  float scale;
  float* s;  // [m, r]
};

// What a thread does to each block of out that it has finished, while the block is in its cache.
struct Finish {
  const void* context;
  void (*run)(const void* context, int64_t row, int64_t row_end, int64_t col, int64_t col_end);
};

struct Sweep {
  Matrix x, g;                   // [m, d], [d, c]; without data where G is in codes,
  const Codes* codes;            // W [c, d] that G is the transpose of, or [d, c] that G is
  bool transposed;
  const Projection* projection;  // null: Z is given
  float* z;                      // [m, r]
  Matrix h;                      // [r, c]
  int64_t r;
  const Matrix* bias;      // [1, c], or null
  const float* gain;       // [c], the factors of all but the bias; null for 1
  const Dropout* dropout;  // on Z H; null for none
  Matrix out;              // [m, c]
  bool has_base;           // out holds X G already: only the rest is added to it
  bool uniform;            // a row's sums go in one order however many rows there are: tiles alone
  const Finish* finish;    // with uniform only; null for none
};

constexpr int64_t FEW_ROWS_DOT = 8;  // two blocks of 4; over codes one
constexpr int64_t FEW_ROWS_AXPY = 8;
constexpr int64_t LINES_OF_X = 16;       // in codes, that read a part of x while it lies in L1
constexpr int64_t WAY = 1024;  // floats after which lines share a place in L1; rows lie between
constexpr int64_t AXPY_SUMS = 4 * 1024;  // floats: sums of one block of columns stay in L1
constexpr int64_t MIN_AXPY_COLUMNS = 256;
constexpr int64_t AXPY_RUN = 128;
constexpr int AXPY_DEPTH = 4;          // rows of G per pass over those sums
constexpr int64_t DOT_RUN = 64;        // products that a lane sums one after the other

inline float bias_at(const Sweep& s, int64_t j) {
  if (!s.bias) return 0;
  float value = 0;
  with_type(s.bias->dtype, s.bias->at(0, j), [&](auto* b) { value = widen(*b); });
  return value;
}

inline void add_bias(const Sweep& s, int64_t j, int64_t count, float* values) {
  if (!s.bias) return;
  for (int64_t i = 0; i < count; i++) values[i] += bias_at(s, j + i);
}

// Whole sums, from column j on: values = gain * values + bias.
inline void end_sums(const Sweep& s, int64_t j, int64_t count, float* values) {
  if (s.gain)
    for (int64_t i = 0; i < count; i++) values[i] *= s.gain[j + i];
  add_bias(s, j, count, values);
}

// totals[i][j] + dots[i][j] += sum_p x[i][p] g[j][p], R rows of x by C rows of g: what fills
// vectors into totals, by lanes, and the rest into dots. The C rows after these are fetched ahead,
// from line `ahead` on each EVERY-th: rows are too short for the processor to see the next ones.
template <int R, int C, int EVERY = 0, class T>
PK_INLINE void add_dots(int64_t depth, const float* x, int64_t x_row, const T* g, int64_t g_row,
                        Vec (&totals)[R][C], float (&dots)[4][4], int64_t ahead = 0) {
  constexpr int64_t LINE = 64 / sizeof(T);
  const int64_t whole = depth / V * V;
  for (int64_t p = 0; p < whole;) {
    Vec acc[R][C]{};
    for (const int64_t end = std::min(whole, p + DOT_RUN * V); p < end; p += V) {
      Vec gs[C];
      for (int j = 0; j < C; j++) gs[j] = load(g + j * g_row + p);
      if (EVERY && p % (EVERY * LINE) == ahead * LINE)
        for (int j = 0; j < C; j++) __builtin_prefetch(g + (C + j) * g_row + p);
      for (int i = 0; i < R; i++) {
        const Vec xs = load(x + i * x_row + p);
        for (int j = 0; j < C; j++) acc[i][j] += xs * gs[j];
      }
    }
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) totals[i][j] += acc[i][j];
  }
  for (int i = 0; i < R && whole < depth; i++)
    for (int j = 0; j < C; j++) {
      float rest = 0;
      for (int64_t q = whole; q < depth; q++) rest += x[i * x_row + q] * widen(g[j * g_row + q]);
      dots[i][j] += rest;
    }
}

// out(row + i, col + j) for R x C elements: G's rows here are columns of the product. Lanes of both
// products are summed once, together.
template <int R, int C>
PK_INLINE void few_dot_block(const Sweep& s, const Matrix& g, const float* x, int64_t row,
                             int64_t col) {
  float dots[4][4];
  for (int j = 0; j < C; j++)
    for (int i = 0; i < R; i++) dots[i][j] = s.gain ? 0 : bias_at(s, col + j);
  const int64_t d = s.x.cols;
  Vec totals[R][C]{};
  with_type(g.dtype, g.data, [&](auto* from) {
    if (s.x.rows > 4)  // in two blocks, of which each fetches half
      add_dots<R, C, 2>(d, x + row * d, d, from, g.col_stride, totals, dots, row / 4);
    else
      add_dots<R, C, 1>(d, x, d, from, g.col_stride, totals, dots);
  });
  if (s.r)
    with_type(s.h.dtype, s.h.at(0, col), [&](auto* h) {
      add_dots<R, C>(s.r, s.z + row * s.r, s.r, h, s.h.col_stride, totals, dots);
    });
  for (int i = 0; i < R; i++) {
    for (int j = 0; j < C; j++) dots[i][j] += sum(totals[i][j]);
    if (s.gain) end_sums(s, col, C, dots[i]);
    store_row(s.out, row + i, col, dots[i], C);
  }
}

// C columns, from the first of g's on.
template <int C>
PK_INLINE void few_dot_columns(const Sweep& s, const Matrix& g, const float* x, int64_t col) {
  const int64_t m = s.x.rows;
  for (int64_t row = 0; row < m; row += 4) switch (m - row) {
      case 1: few_dot_block<1, C>(s, g, x, row, col); break;
      case 2: few_dot_block<2, C>(s, g, x, row, col); break;
      case 3: few_dot_block<3, C>(s, g, x, row, col); break;
      default: few_dot_block<4, C>(s, g, x, row, col);
    }
}

// X as contiguous float rows: in place, or copied to buffer.
inline const float* contiguous_rows(const Matrix& x, float* buffer) {
  const bool in_place = x.dtype == DType::f32 && x.col_stride == 1 && x.row_stride == x.cols;
  if (in_place) return static_cast<const float*>(x.data);
  with_type(x.dtype, x.data, [&](auto* from) {
    for (int64_t i = 0; i < x.rows; i++)
      for (int64_t p = 0; p < x.cols; p++)
        buffer[i * x.cols + p] = widen(from[i * x.row_stride + p * x.col_stride]);
  });
  return buffer;
}

inline void few_dot(const Sweep& s, const float* x, const Parallel& parallel) {
  const int64_t c = s.out.cols, tasks = std::min<int64_t>(parallel.threads, round_up(c, 3) / 3);
  parallel(tasks, [&](int64_t task) {
    const int64_t d = s.x.cols, end = c * (task + 1) / tasks;
    const Scratch widened(s.codes ? 3 * d : 0);
    const auto columns = [&](int64_t col, int64_t count) {
      if (!s.codes) return Matrix{s.g.at(0, col), s.g.dtype, d, count, 1, s.g.col_stride};
      for (int64_t j = 0; j < count; j++) widen_codes(*s.codes, (col + j) * d, d, widened + j * d);
      return Matrix{widened, DType::f32, d, count, 1, d};
    };
    int64_t col = c * task / tasks;
    for (; col + 3 <= end; col += 3) few_dot_columns<3>(s, columns(col, 3), x, col);
    for (; col < end; col++) few_dot_columns<1>(s, columns(col, 1), x, col);
  });
}

// S and Z for a few rows: the same dot products, with the rows of A.
inline void few_project(const Sweep& s, const float* x, const Parallel& parallel) {
  const Projection& p = *s.projection;
  const int64_t m = s.x.rows, d = s.x.cols;
  const Scratch dropped(p.dropout ? m * d : 0);
  if (p.dropout) {
    for (int64_t i = 0; i < m; i++) {
      float* row = dropped + i * d;
      dropout_factors(*p.dropout, i, 0, d, row);
      for (int64_t j = 0; j < d; j++) row[j] *= x[i * d + j];
    }
    x = dropped;
  }
  const Matrix out{p.s, DType::f32, m, s.r, s.r, 1};
  few_dot({.x = s.x, .g = p.a.transposed(), .out = out}, x, parallel);
  for (int64_t i = 0; i < m * s.r; i++) s.z[i] = p.scale * p.s[i];
}

// out(row + i, col) = totals[i], what is left of its sums added.
template <int R>
PK_INLINE void end_code_dots(const Sweep& s, int64_t row, int64_t col, const Vec* totals) {
  float dots[4][4];
  Vec sums[R][1];
  for (int i = 0; i < R; i++) sums[i][0] = totals[i], dots[i][0] = s.gain ? 0 : bias_at(s, col);
  with_type(s.h.dtype, s.h.at(0, col), [&](auto* h) {
    add_dots<R, 1>(s.r, s.z + row * s.r, s.r, h, s.h.col_stride, sums, dots);
  });
  for (int i = 0; i < R; i++) {
    dots[i][0] += sum(sums[i][0]);
    if (s.gain) end_sums(s, col, 1, dots[i]);
    store_row(s.out, row + i, col, dots[i], 1);
  }
}

// R rows, of x or of x split or in pairs, with lines [col, col + lines) of the weight, which are
// columns of G.
template <int R, class X>
PK_INLINE void few_code_dots(const Sweep& s, X x, int64_t row, int64_t col, int64_t lines) {
  constexpr int64_t DEPTH = X::PART / R / MAX_BLOCK * MAX_BLOCK;
  constexpr int FIRST = std::min(R, 4);
  const int64_t d = s.x.cols;
  Vec totals[LINES_OF_X][R]{};
  x.data += row * x.row;
  for (int64_t p = 0; p < d; p += DEPTH)
    for (int64_t j = 0; j < lines; j++)
      add_stretch_dots<R>(*s.codes, {col + j, p, std::min(d, p + DEPTH)}, x, totals[j]);
  for (int64_t j = 0; j < lines; j++) {
    end_code_dots<FIRST>(s, row, col + j, totals[j]);
    if constexpr (R > FIRST) end_code_dots<R - FIRST>(s, row + FIRST, col + j, totals[j] + FIRST);
  }
}

// The product with a weight in codes, of which each is looked up once for up to 8 rows.
template <class X>
void few_code_dot(const Sweep& s, X rows, const Parallel& parallel) {
  const int64_t m = s.x.rows, c = s.out.cols;
  const int64_t tasks = std::min<int64_t>(parallel.threads, c);
  parallel(tasks, [&](int64_t task) {
    const int64_t end = c * (task + 1) / tasks;
    for (int64_t col = c * task / tasks; col < end; col += LINES_OF_X) {
      const int64_t lines = std::min(LINES_OF_X, end - col);
      for (int64_t row = 0; row < m;) switch (m - row) {
          case 1: few_code_dots<1>(s, rows, row, col, lines), row += 1; break;
          case 2: few_code_dots<2>(s, rows, row, col, lines), row += 2; break;
          case 3: few_code_dots<3>(s, rows, row, col, lines), row += 3; break;
          case 8: few_code_dots<8>(s, rows, row, col, lines), row += 8; break;
          default: few_code_dots<4>(s, rows, row, col, lines), row += 4;
        }
    }
  });
}

// The same, rows of floats.
inline void few_code_dot_floats(const Sweep& s, const float* x, const Parallel& parallel) {
  const int64_t m = s.x.rows, d = s.x.cols, width = round_up(d, WAY) + WAY / 2;
  const Scratch buffer(m * width);
  for (int64_t i = 0; i < m; i++)
    if (s.codes->layout == Layout::nibbles)
      split_row(x + i * d, d, buffer + i * width);
    else
      std::memcpy(buffer + i * width, x + i * d, d * sizeof(float));
  few_code_dot(s, FewRows{buffer, width}, parallel);
}

// G with d contiguous: dot products of rows of X with columns of G. H too must have r contiguous.
inline void sweep_few_dot(const Sweep& s, const Parallel& parallel) {
  const Scratch buffer(s.x.rows * s.x.cols);
  const float* x = contiguous_rows(s.x, buffer);
  if (s.projection) few_project(s, x, parallel);
  if (s.codes && is_read_in_place(*s.codes)) return few_code_dot_floats(s, x, parallel);
  few_dot(s, x, parallel);
}

// sums[i][0, cols) = F * (Z H) for one block of columns, and bias without a gain, in rows of width
// floats.
inline void few_axpy_start(const Sweep& s, int64_t col, int64_t cols, int64_t width, float* panel,
                           float* sums) {
  const int64_t m = s.x.rows;
  for (int64_t j = 0; j < cols; j += LANES) {
    pack(s.h, 0, s.r, col + j, std::min<int64_t>(LANES, cols - j), panel);
    for (int64_t i = 0; i < m; i += ROWS)
      with_rows(m - i, [&](auto R) {
        Vec tile[ROWS][VECS]{};
        accumulate<R>(s.r, {s.z + i * s.r, s.r, 1}, panel, LANES, tile);
        for (int a = 0; a < R; a++)
          for (int v = 0; v < VECS; v++) store(sums + (i + a) * width + j + v * V, tile[a][v]);
      });
  }
  const Scratch factors(s.dropout ? cols : 0);
  for (int64_t i = 0; i < m; i++) {
    float* row = sums + i * width;
    if (s.dropout) {
      dropout_factors(*s.dropout, i, col, cols, factors);
      for (int64_t j = 0; j < cols; j++) row[j] *= factors[j];
    }
    if (!s.gain) add_bias(s, col, cols, row);
  }
}

// sums[i][j] += sum over AXPY_DEPTH rows p of x[i][p] g[p][j].
template <class T>
PK_INLINE void axpy_block(int64_t m, const float* x, int64_t x_row, const T* g, int64_t g_row,
                          int64_t cols, int64_t width, float* sums) {
  int64_t j = 0;
  for (; j + LANES <= cols; j += LANES) {
    Vec gs[AXPY_DEPTH][VECS];
    for (int p = 0; p < AXPY_DEPTH; p++)
      for (int v = 0; v < VECS; v++) gs[p][v] = load(g + p * g_row + j + v * V);
    for (int64_t i = 0; i < m; i++) {
      float* to = sums + i * width + j;
      for (int v = 0; v < VECS; v++) {
        Vec total = load(to + v * V);
        for (int p = 0; p < AXPY_DEPTH; p++) total += splat(x[i * x_row + p]) * gs[p][v];
        store(to + v * V, total);
      }
    }
  }
  for (; j < cols; j++)
    for (int64_t i = 0; i < m; i++)
      for (int p = 0; p < AXPY_DEPTH; p++)
        sums[i * width + j] += x[i * x_row + p] * widen(g[p * g_row + j]);
}

// Rows of G where they lie, or widened to buffer.
inline Matrix rows_of_g(const Sweep& s, int64_t row, int64_t rows, int64_t col, int64_t cols,
                        float* buffer) {
  if (!s.codes) return {s.g.at(row, col), s.g.dtype, rows, cols, s.g.row_stride, 1};
  for (int64_t p = 0; p < rows; p++)
    widen_codes(*s.codes, (row + p) * s.codes->cols + col, cols, buffer + p * cols);
  return {buffer, DType::f32, rows, cols, cols, 1};
}

#if defined(__AVX2__)
// totals[i][0, cols) += x[i] W for a block of the weight's columns; sums has room for two such.
inline void few_code_axpy(const Sweep& s, const float* x, int64_t col, int64_t cols, int64_t width,
                          float* sums, float* totals) {
  const int64_t m = s.x.rows, d = s.x.cols;
  float* split = sums + m * width;
  std::memset(sums, 0, 2 * m * width * sizeof(float));
  const int64_t whole = d / LINES * LINES;
  for (int64_t p = 0; p < whole; p += LINES) {
    if (p && p % AXPY_RUN == 0) end_run(m * width, sums, split);
    add_code_lines<LINES>(*s.codes, p, col, cols, m, x + p, d, sums, width);
  }
  for (int64_t p = whole; p < d; p++)
    add_code_lines<1>(*s.codes, p, col, cols, m, x + p, d, sums, width);
  end_run(m * width, sums, split);
  for (int64_t i = 0; i < m; i++) {
    unsplit_row(split + i * width, cols, sums);
    for (int64_t j = 0; j < cols; j++) totals[i * width + j] += sums[j];
  }
}
#endif

// The same of any G: AXPY_DEPTH rows at a time, and those that are left.
inline void few_axpy(const Sweep& s, const float* x, int64_t col, int64_t cols, int64_t width,
                     float* sums, float* totals, float* widened) {
  const int64_t m = s.x.rows, d = s.x.cols, whole = d / AXPY_DEPTH * AXPY_DEPTH;
  std::memset(sums, 0, m * width * sizeof(float));
  for (int64_t p = 0; p < whole; p += AXPY_DEPTH) {
    if (p && p % AXPY_RUN == 0) end_run(m * width, sums, totals);
    const Matrix g = rows_of_g(s, p, AXPY_DEPTH, col, cols, widened);
    with_type(g.dtype, g.data, [&](auto* from) {
      axpy_block(m, x + p, d, from, g.row_stride, cols, width, sums);
    });
  }
  for (int64_t p = whole; p < d; p++) {
    const Matrix g = rows_of_g(s, p, 1, col, cols, widened);
    with_type(g.dtype, g.data, [&](auto* from) {
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < cols; j++) sums[i * width + j] += x[i * d + p] * widen(from[j]);
    });
  }
  end_run(m * width, sums, totals);
}

// G with c contiguous: rows of G scaled by elements of X and summed, in runs as in tile.h.
inline void sweep_few_axpy(const Sweep& s, const Parallel& parallel) {
  const int64_t m = s.x.rows, d = s.x.cols, c = s.out.cols;
  const Scratch x_buffer(m * d);
  const float* x = contiguous_rows(s.x, x_buffer);
  if (s.projection) few_project(s, x, parallel);
  const int64_t width = round_up(std::max<int64_t>(MIN_AXPY_COLUMNS, AXPY_SUMS / m), LANES);
  const int64_t units = round_up(c, LANES) / LANES;
  const int64_t tasks = std::min<int64_t>(parallel.threads, units);
  [[maybe_unused]] const bool in_place = s.codes && is_split_easily(*s.codes);
  parallel(tasks, [&](int64_t task) {
    const Scratch panel(s.r * LANES), sums(2 * m * width), totals(m * width);
    const Scratch widened(s.codes ? AXPY_DEPTH * width : 0);
    const int64_t end = std::min(c, units * (task + 1) / tasks * LANES);
    for (int64_t col = units * task / tasks * LANES; col < end; col += width) {
      const int64_t cols = std::min(width, end - col);
      few_axpy_start(s, col, cols, width, panel, totals);
#if defined(__AVX2__)
      if (in_place)
        few_code_axpy(s, x, col, cols, width, sums, totals);
      else
#endif
        few_axpy(s, x, col, cols, width, sums, totals, widened);
      for (int64_t i = 0; i < m; i++) {
        if (s.gain) end_sums(s, col, cols, totals + i * width);
        store_row(s.out, i, col, totals + i * width, cols);
      }
    }
  });
}

}  // namespace peft_kernels::PK_ISA
