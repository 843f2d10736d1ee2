// What an adapter does to a few rows at a time: its products with their epilogues, and LayerNorm in
// both directions. R rows, 1 to ROWS, go together: their sums are independent of each other, so
// that no sum waits for its own last addition.
#pragma once
#include <cmath>

#include "activations.h"
#include "matrix/philox.h"
#include "matrix/rank_products.h"

namespace peft_kernels::PK_ISA {

// Rows of floats to write to.
struct OutRows {
  float* data;
  int64_t row;
  OutRows at(int64_t i) const { return {data + i * row, row}; }
  operator Rows() const { return {data, row, 1}; }
};

// Mean and 1 / deviation by row.
struct RowStatistics {
  float* data;
  int64_t row;
  RowStatistics at(int64_t i) const { return {data + i * row, row}; }
  float& mean(int64_t i) const { return data[i * row]; }
  float& scale(int64_t i) const { return data[i * row + 1]; }
};

PK_INLINE Vec load(Rows rows, int64_t i, int64_t j, auto lanes) {
  return load(rows.data + i * rows.row + j, lanes);
}
PK_INLINE void store(OutRows rows, int64_t i, int64_t j, Vec v, auto lanes) {
  store(rows.data + i * rows.row + j, v, lanes);
}

// Rows of a contiguous output as floats: in place, or in buffer until store_rows.
inline OutRows rows_of_output(const Matrix& out, int64_t row, float* buffer) {
  if (out.dtype == DType::f32) return {reinterpret_cast<float*>(out.at(row, 0)), out.cols};
  return {buffer, out.cols};
}

inline void store_rows(const Matrix& out, int64_t row, int64_t rows, Rows values) {
  if (reinterpret_cast<const float*>(out.at(row, 0)) == values.data) return;
  for (int64_t i = 0; i < rows; i++)
    store_row(out, row + i, 0, values.data + i * values.row, out.cols);
}

// ---- products --------------------------------------------------------------------------------

// Columns of a matrix as panels of LANES, which every thread reads. Small ones are packed at once.
inline void pack_shared(const Matrix& m, float* panels, const Parallel& parallel) {
  constexpr int64_t SMALL = 128 * 1024;
  const int64_t units = round_up(m.cols, LANES) / LANES;
  const int64_t tasks = m.rows * m.cols < SMALL ? 1 : std::min<int64_t>(parallel.threads, units);
  const auto part = [&](int64_t task) {
    const int64_t col = units * task / tasks * LANES;
    const int64_t end = std::min(m.cols, units * (task + 1) / tasks * LANES);
    pack(m, 0, m.rows, col, end - col, panels + col * m.rows);
  };
  if (tasks == 1) return part(0);
  parallel(tasks, part);
}

inline int64_t panel_floats(const Matrix& m) { return round_up(m.cols, LANES) * m.rows; }

// tile = a B for R rows of a and one panel of B. Not inlined: in a large function the compiler runs
// out of registers, which took 1.4 times as long.
template <int R>
__attribute__((noinline)) void multiply_panel(Rows a, int64_t depth, const float* panel,
                                              float (&out)[ROWS][LANES]) {
  Vec tile[ROWS][VECS]{};
  if (depth <= RUN)  // one run
    accumulate_run<R, true>(depth, a, panel, LANES, tile);
  else
    accumulate<R, true>(depth, a, panel, LANES, tile);
  for (int i = 0; i < R; i++)
    for (int v = 0; v < VECS; v++) store(&out[i][v * V], tile[i][v]);
}

// Calls f(i, j, value, lanes) for the vectors of a B, R rows by the columns that are packed.
template <int R, class F>
PK_INLINE void multiply_rows(Rows a, int64_t depth, const float* panels, int64_t columns, F f) {
  alignas(64) float tile[ROWS][LANES];
  for (int64_t j = 0; j < columns; j += LANES) {
    multiply_panel<R>(a, depth, panels + j * depth, tile);
    by_vectors(std::min<int64_t>(LANES, columns - j), [&](int64_t v, auto lanes) {
      for (int i = 0; i < R; i++) f(i, j + v, load(&tile[i][v]), lanes);
    });
  }
}

// What the update is added to and multiplied by. Rows without data are not there.
struct Update {
  const float *bias, *scale;
  Rows x, residual;
  Rows factors;  // of the dropout
  OutRows t;

  // t = [x] + residual + factor scale (u + bias). What is optional is apart from the one
  // multiply-add, so that it is rounded alike however many rows go together.
  PK_INLINE Vec operator()(int64_t i, int64_t j, Vec u, auto lanes) const {
    Vec addend{}, factor = load(scale + j, lanes);
    if (factors.data) factor *= load(factors, i, j, lanes);
    if (x.data) addend += load(x, i, j, lanes);
    if (residual.data) addend += load(residual, i, j, lanes);
    if (bias) u += load(bias + j, lanes);
    u = u * factor + addend;
    store(t, i, j, u, lanes);
    return u;
  }
};

// One panel of o[r, c] += u^T block.
template <int R>
__attribute__((noinline)) void add_outer_panel(Rows u, int64_t rows, const float* panel, float* o,
                                               int64_t c, int64_t columns) {
  Vec tile[ROWS][VECS]{};
  accumulate<R>(rows, u, panel, LANES, tile);
  alignas(64) float sums[ROWS][LANES];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < VECS; v++) store(&sums[i][v * V], tile[i][v]);
  by_vectors(columns, [&](int64_t v, auto lanes) {
    for (int i = 0; i < R; i++) {
      float* to = o + i * c + v;
      store(to, load(to, lanes) + load(&sums[i][v]), lanes);
    }
  });
}

// Copies N vectors of a block's columns into a panel, and adds up each, by a few rows first.
template <int N>
PK_INLINE void copy_columns(Rows block, int64_t rows, int64_t j, auto lanes, float* panel,
                            float* sums) {
  constexpr int64_t FEW = 16;
  Vec total[N]{};
  for (int64_t i = 0; i < rows; i += FEW) {
    Vec few[N]{};
    for (int64_t e = i; e < std::min(rows, i + FEW); e++)
      for (int v = 0; v < N; v++) {
        const Vec value = load(block, e, j + v * V, lanes);
        store(panel + e * LANES + v * V, value);
        few[v] += value;
      }
    for (int v = 0; v < N; v++) total[v] += few[v];
  }
  for (int v = 0; sums && v < N; v++) {
    float* to = sums + j + v * V;
    store(to, load(to, lanes) + total[v], lanes);
  }
}

// o[r, c] += u^T block, and sums[c] += the block's rows if those are wanted; r may be 0. Rows that
// are a multiple of 1 KB apart share few sets of the L1, so a panel is copied and then read from
// the copy, r / ROWS times.
inline void add_outer_and_sums(Rows u, int64_t r, Rows block, int64_t rows, int64_t c, float* o,
                               float* sums) {
  const Scratch panel(rows * LANES);
  for (int64_t j = 0; j < c; j += LANES) {
    const int64_t columns = std::min<int64_t>(LANES, c - j);
    if (columns == LANES)
      copy_columns<VECS>(block, rows, j, Whole{}, panel, sums);
    else
      by_vectors(columns, [&](int64_t v, auto lanes) {
        copy_columns<1>(block, rows, j + v, lanes, panel + v, sums);
      });
    for (int64_t q = 0; q < r; q += ROWS)
      with_rows(r - q, [&](auto R) {
        add_outer_panel<R>(u.at(q), rows, panel, o + q * c + j, c, columns);
      });
  }
}

inline void add_bias(const float* bias, int64_t rows, int64_t columns, float* z) {
  for (int64_t i = 0; bias && i < rows; i++)
    for (int64_t j = 0; j < columns; j++) z[i * columns + j] += bias[j];
}

inline Rows dropout_rows(const Dropout& dropout, int64_t row, int64_t rows, int64_t columns,
                         float* buffer) {
  for (int64_t i = 0; i < rows; i++)
    dropout_factors(dropout, row + i, 0, columns, buffer + i * columns);
  return {buffer, columns, 1};
}

// ---- LayerNorm -------------------------------------------------------------------------------

// Calls f(begin, count) for runs of a row, whose sums are added up in double.
template <class F>
PK_INLINE void by_runs(int64_t n, F f) {
  constexpr int64_t NORM_RUN = 32 * V;
  for (int64_t j = 0; j < n; j += NORM_RUN) f(j, std::min(NORM_RUN, n - j));
}

template <int R>
PK_INLINE void add_row_sums(Rows rows, int64_t n, Vec (&sums)[ROWS]) {
  by_vectors(n, [&](int64_t j, auto lanes) {
    for (int i = 0; i < R; i++) sums[i] += load(rows, i, j, lanes);
  });
}

// The deviation is taken around the mean: E[t^2] - E[t]^2 loses it where the mean is large. What is
// left of the mean then is the rounding of the first sum.
template <int R>
PK_INLINE void set_statistics(Rows t, int64_t n, const Vec (&sums)[ROWS], float eps,
                              RowStatistics statistics) {
  double squares[R]{}, rests[R]{};
  for (int i = 0; i < R; i++) statistics.mean(i) = sum(sums[i]) / n;
  by_runs(n, [&](int64_t begin, int64_t count) {
    Vec square[R]{}, rest[R]{};
    by_vectors(count, [&](int64_t j, auto lanes) {
      for (int i = 0; i < R; i++) {
        const Vec d = keep(load(t, i, begin + j, lanes) - statistics.mean(i), lanes);
        square[i] += d * d;
        rest[i] += d;
      }
    });
    for (int i = 0; i < R; i++) squares[i] += sum(square[i]), rests[i] += sum(rest[i]);
  });
  for (int i = 0; i < R; i++) {
    statistics.mean(i) += float(rests[i] / n);
    statistics.scale(i) = float(1 / std::sqrt(squares[i] / n + eps));
  }
}

// out = LN(t); the two may be the same rows.
template <int R>
PK_INLINE void normalize(Rows t, int64_t n, RowStatistics statistics, const AdapterNorm& norm,
                         OutRows out) {
  by_vectors(n, [&](int64_t j, auto lanes) {
    const Vec weight = load(norm.weight + j, lanes);
    const Vec bias = norm.bias ? load(norm.bias + j, lanes) : Vec{};
    for (int i = 0; i < R; i++) {
      const Vec t_hat = (load(t, i, j, lanes) - statistics.mean(i)) * statistics.scale(i);
      store(out, i, j, t_hat * weight + bias, lanes);
    }
  });
}

// A product that is rounded before it goes on: d - mean(d) is 0 for one column, and stays it.
PK_INLINE Vec rounded(Vec product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// out = LN'(dy; t) [+ add], and sums[0][j] += dy t_hat, sums[1][j] += dy over the rows. What has no
// data is neither added nor written; out may be dy's rows or t's.
template <int R>
PK_INLINE void normalize_backward(Rows dy, Rows t, int64_t n, RowStatistics statistics,
                                  const float* weight, float* sums, Rows add, OutRows out) {
  double of_d[R]{}, of_d_t[R]{};
  const auto t_hat = [&](int64_t i, int64_t j, auto lanes) {
    return (load(t, i, j, lanes) - statistics.mean(i)) * statistics.scale(i);
  };
  by_runs(n, [&](int64_t begin, int64_t count) {
    Vec run_d[R]{}, run_d_t[R]{};
    by_vectors(count, [&](int64_t offset, auto lanes) {
      const int64_t j = begin + offset;
      const Vec w = load(weight + j, lanes);
      Vec weight_sum{}, bias_sum{};
      for (int i = 0; i < R; i++) {
        const Vec grad = load(dy, i, j, lanes), hat = t_hat(i, j, lanes), d = rounded(grad * w);
        run_d[i] += d;
        run_d_t[i] += d * hat;
        weight_sum += grad * hat;
        bias_sum += grad;
      }
      if (!sums) return;
      store(sums + j, load(sums + j, lanes) + weight_sum, lanes);
      store(sums + n + j, load(sums + n + j, lanes) + bias_sum, lanes);
    });
    for (int i = 0; i < R; i++) of_d[i] += sum(run_d[i]), of_d_t[i] += sum(run_d_t[i]);
  });
  if (!out.data) return;
  float mean[R], projection[R];
  for (int i = 0; i < R; i++)
    mean[i] = float(of_d[i] / n), projection[i] = float(of_d_t[i] / n);
  by_vectors(n, [&](int64_t j, auto lanes) {
    const Vec w = load(weight + j, lanes);
    for (int i = 0; i < R; i++) {
      const Vec d = rounded(load(dy, i, j, lanes) * w);
      Vec dt = (d - mean[i] - t_hat(i, j, lanes) * projection[i]) * statistics.scale(i);
      if (add.data) dt += load(add, i, j, lanes);
      store(out, i, j, dt, lanes);
    }
  });
}

}  // namespace peft_kernels::PK_ISA
