// The low-rank products of rows that have different adapters, read from the pages where they lie.
//
// Every element's sum goes in one order: a dot product by lanes of p, an update by rank rows, a
// gradient by rows of its adapter. How rows and columns are blocked together changes no bit.
#pragma once
#include <atomic>

#include "multi_lora_linear.h"
#include "rank_products.h"
#include "sweep.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t DOT_ROWS = 3, DOT_COLS = 4;  // accumulators that AVX2's registers hold
constexpr int64_t OUTER_ROWS = 64;             // gathered at once

// Threads take the units one by one, as their ranks may differ much.
template <class F>
void for_units(const Work& work, const Parallel& parallel, F f) {
  std::atomic<int64_t> next{0};
  parallel(std::min<int64_t>(parallel.threads, work.unit_count), [&](int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < work.unit_count;) {
      const Unit& unit = work.units[i];
      f(unit, work.groups[unit.group], work.rows);
    }
  });
}

inline int64_t page_rows(const Group& group, int64_t page) {
  return std::min(PAGE, group.rank - page * PAGE);
}

// ---- S = x A^T -------------------------------------------------------------------------------

// sums[i][j] = x[i] . g[j], R rows of x by C rows of g.
template <int R, int C, class T>
PK_INLINE void dots(int64_t depth, const float* const* x, const T* g, int64_t g_row,
                    float (&sums)[DOT_ROWS][DOT_COLS]) {
  Vec acc[R][C]{};
  int64_t p = 0;
  for (; p + V <= depth; p += V) {
    Vec gs[C];
    for (int j = 0; j < C; j++) gs[j] = load(g + j * g_row + p);
    for (int i = 0; i < R; i++) {
      const Vec xs = load(x[i] + p);
      for (int j = 0; j < C; j++) acc[i][j] += xs * gs[j];
    }
  }
  for (int i = 0; i < R; i++)
    for (int j = 0; j < C; j++) {
      sums[i][j] = sum(acc[i][j]);
      for (int64_t q = p; q < depth; q++) sums[i][j] += x[i][q] * widen(g[j * g_row + q]);
    }
}

// Calls f with count as a compile-time constant, 1 to MOST.
template <int MOST, class F>
PK_INLINE void with_count(int64_t count, F f) {
  if constexpr (MOST > 1)
    if (count < MOST) return with_count<MOST - 1>(count, f);
  f(std::integral_constant<int, MOST>{});
}

// The unit's rows as floats under dropout: where they lie, or copied to buffer.
inline void float_pointers(const Matrix& x, const Group& group, const Unit& unit,
                           const int64_t* rows, float* buffer, const float** pointers) {
  const int64_t k = x.cols;
  const bool drops = group.dropout.threshold != 0, copies = drops || x.dtype != DType::f32;
  const Scratch factors(drops ? k : 0);
  for (int64_t i = unit.begin; i < unit.end; i++) {
    float* copy = buffer + (i - unit.begin) * k;
    pointers[i - unit.begin] = copies ? copy : reinterpret_cast<float*>(x.at(rows[i], 0));
    if (!copies) continue;
    with_type(x.dtype, x.at(rows[i], 0), [&](auto* from) { widen_row(from, copy, k); });
    if (!drops) continue;
    dropout_factors(group.dropout, i - group.begin, 0, k, factors);
    for (int64_t p = 0; p < k; p++) copy[p] *= factors[p];
  }
}

inline void shrink(const Shrink& t, const Parallel& parallel) {
  const int64_t k = t.x.cols;
  for_units(t.work, parallel, [&](const Unit& unit, const Group& group, const int64_t* rows) {
    const int64_t count = unit.end - unit.begin;
    const bool copies = group.dropout.threshold != 0 || t.x.dtype != DType::f32;
    const Scratch buffer(copies ? count * k : 0);
    const float* x[UNIT_ROWS];
    float sums[DOT_ROWS][DOT_COLS];
    float_pointers(t.x, group, unit, rows, buffer, x);
    const float factor = t.scaled ? group.scale : 1;
    for (int64_t page = unit.part_begin; page < unit.part_end; page++)
      for (int64_t q = 0; q < page_rows(group, page); q += DOT_COLS)
        with_type(t.pages.data.dtype, t.pages.data.at(t.pages.row(group.slot, page) + q, 0),
                  [&](auto* a) {
          with_count<DOT_COLS>(page_rows(group, page) - q, [&](auto C) {
            for (int64_t i = 0; i < count; i += DOT_ROWS)
              with_count<DOT_ROWS>(count - i, [&](auto R) {
                dots<R, C>(k, x + i, a, t.pages.data.row_stride, sums);
                for (int b = 0; b < R; b++) {
                  float* s = t.s.data + rows[unit.begin + i + b] * t.s.stride + page * PAGE + q;
                  for (int c = 0; c < C; c++) s[c] = sums[b][c] * factor;
                }
              });
          });
        });
  });
}

// ---- y += S B --------------------------------------------------------------------------------

// The first count elements of a vector, 0 in the rest.
template <class T>
PK_INLINE Vec load_part(const T* from, int64_t count) {
  if (count >= V) return load(from);
  alignas(64) float values[V] = {};
  for (int64_t i = 0; i < count; i++) values[i] = widen(from[i]);
  return load(values);
}

// acc[i][c] = sum_q z[i][q] B_g[q, col + c V...], R rows by C vectors, the last of them in part.
template <int R, int C, class T>
PK_INLINE void update_block(const Pages& pages, const T* base, const Group& group, const float* z,
                            int64_t col, int64_t cols, Vec (&acc)[R][C]) {
  for (int64_t page = 0; page * PAGE < group.rank; page++) {
    const T* b = base + pages.row(group.slot, page) * pages.data.row_stride + col;
    const float* from = z + page * PAGE;
    for (int64_t q = 0; q < page_rows(group, page); q++, b += pages.data.row_stride) {
      Vec lanes[C];
      for (int c = 0; c < C; c++) lanes[c] = load_part(b + c * V, cols - c * V);
#pragma GCC unroll 6
      for (int i = 0; i < R; i++) {
        const Vec factor = splat(from[i * group.rank + q]);
        for (int c = 0; c < C; c++) acc[i][c] += factor * lanes[c];
      }
    }
  }
}

constexpr int64_t UPDATE_COLUMNS = 8 * V;
constexpr int64_t UPDATE_ROWS = 6;

// As many vectors of columns at once as registers hold; done(i, j, cols, vector) takes each.
template <int R, class T, class Done>
PK_INLINE void update_rows(const Pages& pages, const T* base, const Group& group, const float* z,
                           int64_t col, int64_t cols, Done done) {
  constexpr int C = R == 1 ? 8 : R == 2 ? 4 : R == 3 ? 3 : 2;
  int64_t j = 0;
  for (; j + C * V <= cols; j += C * V) {
    Vec acc[R][C]{};
    update_block<R, C>(pages, base, group, z, col + j, C * V, acc);
    for (int i = 0; i < R; i++)
      for (int c = 0; c < C; c++) done(i, j + c * V, V, acc[i][c]);
  }
  for (; j < cols; j += V) {
    Vec acc[R][1]{};
    update_block<R, 1>(pages, base, group, z, col + j, cols - j, acc);
    for (int i = 0; i < R; i++) done(i, j, std::min<int64_t>(V, cols - j), acc[i][0]);
  }
}

// y[row, col...] += factors * values; no factors are all 1.
inline void add_values(const Matrix& y, int64_t row, int64_t col, int64_t cols, float* values,
                       const float* factors) {
  if (factors)
    for (int64_t j = 0; j < cols; j++) values[j] *= factors[j];
  add_row(y, row, col, values, cols);
  store_row(y, row, col, values, cols);
}

// rows[begin, end) of a group, at most UNIT_ROWS, for columns [col, col_end) of the pages.
inline void expand_rows(const Expand& t, const Group& group, int64_t begin, int64_t end,
                        int64_t col, int64_t col_end, float* z) {
  const int64_t count = end - begin, rank = group.rank;
  const bool masked = t.masked && group.dropout.threshold != 0;
  const bool in_place = t.y.dtype == DType::f32 && !masked;
  const float factor = t.scaled ? group.scale : 1;
  for (int64_t i = 0; i < count; i++) {
    const float* s = t.s.data + t.work.rows[begin + i] * t.s.stride;
    for (int64_t q = 0; q < rank; q++) z[i * rank + q] = s[q] * factor;
  }
  const auto y_row = [&](int64_t i) { return t.work.rows[begin + i] - t.first_row; };
  with_type(t.pages.data.dtype, t.pages.data.data, [&](auto* base) {
    for (; col < col_end; col += UPDATE_COLUMNS) {
      const int64_t cols = std::min(UPDATE_COLUMNS, col_end - col);
      for (int64_t i = 0; i < count;) {
        const int64_t rest = count - i, rows = rest >= 6 ? 6 : rest >= 3 ? 3 : rest;
        alignas(64) float values[UPDATE_ROWS][UPDATE_COLUMNS], factors[UPDATE_COLUMNS];
        const auto block = [&](auto R) {
          update_rows<R>(t.pages, base, group, z + i * rank, col, cols,
                         [&](int a, int64_t j, int64_t lanes, Vec sums) {
            float* y = reinterpret_cast<float*>(t.y.at(y_row(i + a), t.column + col + j));
            if (in_place && lanes == V)
              store(y, load(y) + sums);
            else if (in_place)
              for (int64_t l = 0; l < lanes; l++) y[l] += sums[l];
            else
              store(&values[a][j], sums);
          });
        };
        switch (rows) {
          case 6: block(std::integral_constant<int, 6>{}); break;
          case 3: block(std::integral_constant<int, 3>{}); break;
          case 2: block(std::integral_constant<int, 2>{}); break;
          default: block(std::integral_constant<int, 1>{});
        }
        for (int64_t a = 0; a < rows && !in_place; a++) {
          if (masked) dropout_factors(group.dropout, begin + i + a - group.begin, col, cols, factors);
          add_values(t.y, y_row(i + a), t.column + col, cols, values[a],
                     masked ? factors : nullptr);
        }
        i += rows;
      }
    }
  });
}

inline void expand(const Expand& t, const Parallel& parallel) {
  for_units(t.work, parallel, [&](const Unit& unit, const Group& group, const int64_t*) {
    const Scratch z(UNIT_ROWS * group.rank);
    expand_rows(t, group, unit.begin, unit.end, unit.part_begin, unit.part_end, z);
  });
}

// Rows [row, row_end) of y by its columns [col, col_end), on the calling thread.
inline void expand_region(const Expand& t, int64_t row, int64_t row_end, int64_t col,
                          int64_t col_end) {
  const int64_t first = std::max<int64_t>(0, col - t.column);
  const int64_t last = std::min(t.pages.data.cols, col_end - t.column);
  if (first >= last) return;
  row += t.first_row, row_end += t.first_row;
  for (int64_t g = 0; g < t.work.group_count; g++) {
    const Group& group = t.work.groups[g];
    const int64_t *rows = t.work.rows + group.begin, *rows_end = t.work.rows + group.end;
    const int64_t begin = std::lower_bound(rows, rows_end, row) - t.work.rows;
    const int64_t end = std::lower_bound(rows, rows_end, row_end) - t.work.rows;
    if (begin == end) continue;
    const Scratch z(UNIT_ROWS * group.rank);
    for (int64_t i = begin; i < end; i += UNIT_ROWS)
      expand_rows(t, group, i, std::min(end, i + UNIT_ROWS), first, last, z);
  }
}

// ---- dA = dS^T x, dB^T = scale S^T dy --------------------------------------------------------

inline void outer(const Outer& t, const Parallel& parallel) {
  for_units(t.work, parallel, [&](const Unit& unit, const Group& group, const int64_t* rows) {
    const int64_t rank = group.rank, col = unit.part_begin, cols = unit.part_end - col;
    const bool masked = t.masked && group.dropout.threshold != 0;
    const Scratch x(OUTER_ROWS * cols), u(OUTER_ROWS * rank), sums(rank * cols);
    const Scratch factors(masked ? cols : 0);
    std::memset(sums, 0, rank * cols * sizeof(float));
    for (int64_t row = unit.begin; row < unit.end; row += OUTER_ROWS) {
      const int64_t count = std::min(OUTER_ROWS, unit.end - row);
      for (int64_t i = 0; i < count; i++) {
        float* to = x + i * cols;
        with_type(t.x.dtype, t.x.at(rows[row + i], col),
                  [&](auto* from) { widen_row(from, to, cols); });
        if (masked) {
          dropout_factors(group.dropout, row + i - group.begin, col, cols, factors);
          for (int64_t j = 0; j < cols; j++) to[j] *= factors[j];
        }
        const float* s = t.s.data + rows[row + i] * t.s.stride;
        for (int64_t q = 0; q < rank; q++) u[i * rank + q] = s[q];
      }
      add_outer({u, 1, rank}, rank, {x, cols, 1}, count, cols, sums);
    }
    const float factor = t.scaled ? group.scale : 1;
    for (int64_t q = 0; q < rank; q++) {
      for (int64_t j = 0; j < cols; j++) sums[q * cols + j] *= factor;
      store_row(t.out, t.out_rows[group.slot] + q, col, sums + q * cols, cols);
    }
  });
}

}  // namespace peft_kernels::PK_ISA
