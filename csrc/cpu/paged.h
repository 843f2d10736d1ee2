// The low-rank products of rows that have different adapters, read from the pages where they lie.
//
// Every element's sum goes in one order: a dot product by lanes of p, an update by rank rows, a
// gradient by rows of its adapter. How rows and columns are blocked together changes no bit.
#pragma once
#include <atomic>
#include <memory>
#include <thread>

#include "multi_lora_linear.h"
#include "matrix/rank_products.h"
#include "matrix/sweep.h"

namespace peft_kernels::PK_ISA {

constexpr int EXPAND_TILE = 4;                 // rows of an update that share what is read of B
constexpr int64_t EXPAND_COLUMNS = 1024;       // of those, whose sums stay in L1
constexpr int64_t LINE = 64;                   // bytes
constexpr int64_t OUTER_ROWS = 64;             // gathered at once
constexpr int64_t ACROSS_COLUMNS = 256;        // of a B that isn't transposed, at a time
constexpr int64_t RUN_PAGES = RUN / PAGE;      // rank rows of an update that make a run

template <class Bank>
int64_t units_of(const Bank* banks, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; i++) total += banks[i].work.unit_count;
  return total;
}

// The units of all banks, each bank's shared out evenly. A thread that has done its own takes
// others', as ranks may differ much; calls give a thread the same columns first, which its caches
// may hold.
template <class Bank, class F>
class Shares {
 public:
  Shares(const Bank* of_banks, int64_t count, int64_t of_threads, F run_unit)
      : banks(of_banks), banks_end(of_banks + count), threads(of_threads), f(run_unit),
        next(new Next[of_threads]{}), left(units_of(of_banks, count)) {}

  void run(int64_t thread) {
    int64_t count = 0;
    for (int64_t i = 0; i < threads; i++) {
      const int64_t share = (thread + i) % threads;
      while (run_one(share, next[share].unit.fetch_add(1))) count++;
    }
    left.fetch_sub(count);
  }

  // Until all are done. What isn't is in the hands of a thread that runs, however many do.
  void wait() const {
    while (left.load() > 0) std::this_thread::yield();
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> unit;
  };

  // The i-th unit of a share, if it has so many.
  bool run_one(int64_t share, int64_t i) const {
    for (const Bank* bank = banks; bank < banks_end; bank++) {
      const int64_t count = bank->work.unit_count, first = count * share / threads;
      const int64_t own = count * (share + 1) / threads - first;
      if (i < own) return f(*bank, bank->work.units[first + i]), true;
      i -= own;
    }
    return false;
  }

  const Bank *banks, *banks_end;
  int64_t threads;
  F f;
  std::unique_ptr<Next[]> next;
  std::atomic<int64_t> left;
};

template <class Bank, class F>
void for_units(const Bank* banks, int64_t count, const Parallel& parallel, F f) {
  const int64_t threads = std::min<int64_t>(parallel.threads, units_of(banks, count));
  if (!threads) return;
  Shares<Bank, F> shares(banks, count, threads, f);
  parallel(threads, [&](int64_t thread) { shares.run(thread); });
}

inline int64_t page_rows(const Group& group, int64_t page) {
  return std::min(PAGE, group.rank - page * PAGE);
}

// Calls f with count as a compile-time constant, 1 to MOST.
template <int MOST, class F>
PK_INLINE void with_count(int64_t count, F f) {
  if constexpr (MOST > 1)
    if (count < MOST) return with_count<MOST - 1>(count, f);
  f(std::integral_constant<int, MOST>{});
}

// Calls f(i, rows) for tiles of at most MOST rows, as even as they can be: a tile of one row would
// read as much of the other factor as a full one.
template <int MOST, class F>
PK_INLINE void for_tiles(int64_t count, F f) {
  const int64_t tiles = (count + MOST - 1) / MOST;
  for (int64_t tile = 0, i = 0; tile < tiles; tile++) {
    const int64_t rows = (count - i + tiles - tile - 1) / (tiles - tile);
    with_count<MOST>(rows, [&](auto R) { f(i, R); });
    i += rows;
  }
}

// ---- y += S B --------------------------------------------------------------------------------

// The first count elements of a vector, 0 in the rest.
template <class T>
PK_INLINE Vec load_part(const T* from, int64_t count) {
  alignas(64) float values[V] = {};
  for (int64_t i = 0; i < std::min<int64_t>(V, count); i++) values[i] = widen(from[i]);
  return load(values);
}

// values[j] += out(row, col + j).
inline void add_row(const Matrix& out, int64_t row, int64_t col, float* values, int64_t count) {
  with_type(out.dtype, out.at(row, col), [&](auto* from) {
    for (int64_t j = 0; j < count; j++) values[j] += widen(from[j * out.col_stride]);
  });
}

// What expand does with a piece of y once its sums are there.
struct Addend {
  const Expand& t;
  const Group& group;
  int64_t begin;  // the position of row 0
  bool masked, in_place;
  bool in_caches;  // y, unless rows are many: those were written too long ago

  PK_INLINE int64_t row(int64_t i) const { return t.work.rows[begin + i] - t.first_row; }
  PK_INLINE char* at(int64_t i, int64_t col) const {
    return static_cast<char*>(t.y.at(row(i), t.column + col));
  }

  void fetch(int64_t i, int64_t col, int64_t cols) const {
    const char *y = at(i, col), *end = at(i, col + cols);
    for (; y < end; y += LINE) __builtin_prefetch(y, 0, 2);  // into L2
  }

  // y[i, col...] += mask * sums.
  void add(int64_t i, int64_t col, int64_t cols, float* sums) const {
    if (masked) {
      alignas(64) float factors[EXPAND_COLUMNS];
      dropout_factors(group.dropout, begin + i - group.begin, col, cols, factors);
      for (int64_t j = 0; j < cols; j++) sums[j] *= factors[j];
    }
    const int64_t whole = in_place ? cols / V * V : 0;
    if (whole)
      with_type(t.y.dtype, at(i, col), [&](auto* y) {
        for (int64_t j = 0; j < whole; j += V) store(y + j, load(y + j) + load(sums + j));
      });
    add_row(t.y, row(i), t.column + col + whole, sums + whole, cols - whole);
    store_row(t.y, row(i), t.column + col + whole, sums + whole, cols - whole);
  }
};

// sums[a][j] += sum_q z[a][q] b[q, j] over Q rank rows, in their order.
template <int R, int Q, class T>
PK_INLINE void add_rank_rows(const float* z, int64_t rank, const T* b, int64_t step, int64_t cols,
                             float (&sums)[R][EXPAND_COLUMNS]) {
  const auto add = [&](int64_t j, const Vec (&lanes)[Q]) {
    for (int a = 0; a < R; a++) {
      Vec total = load(sums[a] + j);
      for (int q = 0; q < Q; q++) total += splat(z[a * rank + q]) * lanes[q];
      store(sums[a] + j, total);
    }
  };
  int64_t j = 0;
  Vec lanes[Q];
  for (; j + V <= cols; j += V) {
    for (int q = 0; q < Q; q++) lanes[q] = load(b + q * step + j);
    add(j, lanes);
  }
  if (j == cols) return;
  for (int q = 0; q < Q; q++) lanes[q] = load_part(b + q * step + j, cols - j);
  add(j, lanes);
}

// R rows. B_g's rows are read along, a few streams at a time: where rows are few, reading is the
// most of it, and where they are many, B_g comes from L2 and y is walked along too.
template <int R, class T>
void expand_tile(const Addend& to, const float* z, int64_t i, int64_t col, int64_t cols) {
  const Pages& pages = to.t.pages;
  const int64_t step = pages.data.row_stride;
  const int64_t rank = to.group.rank, width = round_up(cols, V);
  alignas(64) float sums[R][EXPAND_COLUMNS], before[R][EXPAND_COLUMNS];
  z += i * rank;
  for (int a = 0; a < R; a++) {
    if (!to.in_caches) to.fetch(i + a, col, cols);
    std::memset(sums[a], 0, width * sizeof(float));
    if (rank > RUN) std::memset(before[a], 0, width * sizeof(float));
  }
  for (int64_t page = 0; page * PAGE < rank; page++) {
    if (page && page % RUN_PAGES == 0)
      for (int a = 0; a < R; a++) end_run(width, sums[a], before[a]);
    const T* b = pages.first<T>(to.group.slot, page) + col;
    const float* factors = z + page * PAGE;
    const int64_t count = page_rows(to.group, page);
    int64_t q = 0;
    for (; q + 4 <= count; q += 4)
      add_rank_rows<R, 4>(factors + q, rank, b + q * step, step, cols, sums);
    for (; q < count; q++)
      add_rank_rows<R, 1>(factors + q, rank, b + q * step, step, cols, sums);
  }
  for (int a = 0; a < R; a++) {
    for (int64_t j = 0; rank > RUN && j < cols; j++) sums[a][j] += before[a][j];
    to.add(i + a, col, cols, sums[a]);
  }
}

// rows[begin, end) of a group, at most EXPAND_ROWS, for columns [col, col_end) of the pages.
inline void expand_rows(const Expand& t, const Group& group, int64_t begin, int64_t end,
                        int64_t col, int64_t col_end) {
  const int64_t count = end - begin, rank = group.rank;
  const Scratch z(count * rank);
  const bool masked = t.masked && group.dropout.threshold != 0;
  const Addend to{t, group, begin, masked, !masked && t.y.col_stride == 1,
                  count <= EXPAND_ROWS / 2};
  const float factor = t.scaled ? group.scale : 1;
  for (int64_t i = 0; i < count; i++) {
    const float* s = t.s.data + t.work.rows[begin + i] * t.s.stride;
    for (int64_t q = 0; q < rank; q++) z[i * rank + q] = s[q] * factor;
  }
  with_type(t.pages.data.dtype, nullptr, [&]<class T>(T*) {
    for (int64_t j = col; j < col_end; j += EXPAND_COLUMNS)
      for_tiles<EXPAND_TILE>(count, [&](int64_t i, auto R) {
        expand_tile<R, T>(to, z, i, j, std::min(EXPAND_COLUMNS, col_end - j));
      });
  });
}

inline void expand_unit(const Expand& t, const Unit& unit) {
  const Group& group = t.work.groups[unit.group];
  expand_rows(t, group, unit.begin, unit.end, unit.part_begin, unit.part_end);
}

inline void expand(const Expand* banks, int64_t count, const Parallel& parallel) {
  for_units(banks, count, parallel, expand_unit);
}

// to[q, j] = from[j, q] for from [n, r], by B x B blocks.
template <class T>
void transpose_rows(const T* from, int64_t n, int64_t r, float* to) {
  const int64_t rows = n / B * B, cols = r / B * B;
  for (int64_t j = 0; j < rows; j += B)
    for (int64_t q = 0; q < cols; q += B) {
      Block block[B];
      for (int i = 0; i < B; i++) block[i] = load_block(from + (j + i) * r + q);
      transpose(block);
      for (int i = 0; i < B; i++) std::memcpy(to + (q + i) * n + j, &block[i], sizeof(Block));
    }
  for (int64_t j = 0; j < n; j++)
    for (int64_t q = j < rows ? cols : 0; q < r; q++) to[q * n + j] = widen(from[j * r + q]);
}

// rows[begin, end) of a group, for columns [col, col_end) of the pages.
inline void expand_group(const Expand& t, const Group& group, int64_t begin, int64_t end,
                         int64_t col, int64_t col_end) {
  for (int64_t i = begin; i < end; i += EXPAND_ROWS)
    expand_rows(t, group, i, std::min(end, i + EXPAND_ROWS), col, col_end);
}

// The same of a B [n, r]: a strip of it is transposed at a time, so that no copy of B is held.
inline void expand_group_across(const Expand& t, const Group& group, int64_t begin, int64_t end,
                                int64_t col, int64_t col_end) {
  const int64_t rank = group.rank;
  const Scratch strip(rank * std::min(ACROSS_COLUMNS, col_end - col));
  const void *all = t.pages.apart[group.slot], *rows = strip;
  Group own = group;
  own.slot = 0;
  for (int64_t j = col; j < col_end; j += ACROSS_COLUMNS) {
    const int64_t width = std::min(ACROSS_COLUMNS, col_end - j);
    with_type(t.pages.data.dtype, const_cast<void*>(all), [&](auto* b) {
      transpose_rows(b + j * rank, width, rank, strip);
    });
    Expand part = t;
    part.column += j;
    part.pages = {{nullptr, DType::f32, 0, width, width, 1}, nullptr, t.pages.max_pages, &rows};
    expand_group(part, own, begin, end, 0, width);
  }
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
    (t.pages.across ? expand_group_across : expand_group)(t, group, begin, end, first, last);
  }
}

// ---- dA = dS^T x, dB^T = scale S^T dy --------------------------------------------------------

inline void outer(const Outer& t, const Parallel& parallel) {
  for_units(&t, 1, parallel, [](const Outer& t, const Unit& unit) {
    const Group& group = t.work.groups[unit.group];
    const int64_t* rows = t.work.rows;
    const int64_t rank = group.rank, col = unit.part_begin, cols = unit.part_end - col;
    const bool masked = t.masked && group.dropout.threshold != 0;
    const Scratch x(OUTER_ROWS * cols), u(OUTER_ROWS * rank);
    const Scratch factors(masked ? cols : 0);
    const Scratch sums(rank * cols);
    RowSums row_sums(sums, rank * cols, unit.end - unit.begin);
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
      add_outer({u, 1, rank}, rank, {x, cols, 1}, count, cols, row_sums.next());
      row_sums.end_block(count);
    }
    row_sums.finish();
    const float factor = t.scaled ? group.scale : 1;
    for (int64_t q = 0; q < rank; q++) {
      for (int64_t j = 0; j < cols; j++) sums[q * cols + j] *= factor;
      store_row(t.out, t.out_rows[group.slot] + q, col, sums + q * cols, cols);
    }
  });
}

}  // namespace peft_kernels::PK_ISA
