// Both rank-sized products of a gradient or activation X [m, c], from one read of it:
//
//     Z[m, r] = z_scale X H          H [c, r]
//     O[r, c] = o_scale U^T X        U [m, r]
//
// with X under dropout if asked. The backward takes dS and dB from dy together, and dA from x.
// Each thread owns a range of rows, in blocks that stay in its L2 between the two products; the
// partial sums of O are added in a fixed order, so the same inputs give the same bits.
#pragma once
#include "philox.h"
#include "row_sums.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t BLOCK_FLOATS = 64 * 1024;  // of X: half of a 512 KB L2
constexpr int64_t MIN_TASK_ROWS = 16;
constexpr int64_t PARTIAL_FLOATS = 16 * 1024 * 1024;  // of O's partial sums, at most
constexpr int64_t PREFETCH = 8 * LANES;
// Up to so many of partial sums and sums, fetching them from another core's cache takes longer than
// adding them up alone: dA of 16 x 2048 in 0.65 of the time on Zen 4. Not so where O is stored by
// columns, in which the stores are most of it: dB took 1.15 alone.
constexpr int64_t ALONE_FLOATS = 128 * 1024;

struct RankProducts {
  Matrix x;
  const Dropout* dropout;  // on x, whose rows are contiguous then; null for none
  const Matrix* h;         // null: no Z
  float* z;
  float z_scale;
  const float* u;
  float o_scale;
  const Matrix* o;  // null: no O
  int64_t r;
};

// Rows of X as floats with dropout applied: in place where neither needs a copy.
inline Rows block_of(const RankProducts& t, int64_t row, int64_t rows, float* buffer) {
  const int64_t c = t.x.cols;
  const Rows block = float_rows(t.x, row, rows, 0, c, buffer);
  if (!t.dropout) return block;
  const Scratch factors(c);
  for (int64_t i = 0; i < rows; i++) {
    dropout_factors(*t.dropout, row + i, 0, c, factors);
    const float* from = block.data + i * block.row;
    for (int64_t j = 0; j < c; j++) buffer[i * c + j] = from[j] * factors[j];
  }
  return {buffer, c, 1};
}

// z[rows, r] = scale * block * h, whose columns are packed as [r_pad / LANES][c][LANES].
inline void project(Rows block, int64_t rows, int64_t c, const float* h_panels, int64_t r,
                    float scale, float* z) {
  alignas(64) float values[LANES];
  for (int64_t i = 0; i < rows; i += ROWS)
    for (int64_t q = 0; q < r; q += LANES)
      with_rows(rows - i, [&](auto R) {
        Vec tile[ROWS][VECS]{};
        accumulate<R>(c, block.at(i), h_panels + q * c, LANES, tile);
        for (int a = 0; a < R; a++) {
          for (int v = 0; v < VECS; v++) store(values + v * V, tile[a][v] * scale);
          for (int64_t j = q; j < std::min(r, q + LANES); j++) z[(i + a) * r + j] = values[j - q];
        }
      });
}

// sum_i u(i, q) block(i, p) for one element of what follows, in runs.
inline float outer_element(Rows u, int64_t q, Rows block, int64_t p, int64_t rows) {
  float total = 0;
  for (int64_t begin = 0; begin < rows; begin += RUN) {
    float sum = 0;
    for (int64_t i = begin; i < std::min(rows, begin + RUN); i++)
      sum += u.data[q * u.row + i * u.step] * block.data[i * block.row + p];
    total += sum;
  }
  return total;
}

// o[r, c] += u^T block, for the whole lanes of c; the columns beyond them take the scalar loop.
inline void add_outer(Rows u, int64_t r, Rows block, int64_t rows, int64_t c, float* o) {
  int64_t j = 0;
  for (; j + LANES <= c; j += LANES) {
    // A walk down a column outruns the hardware prefetcher: a new page for each row.
    for (int64_t i = 0; i < rows; i++)
      __builtin_prefetch(block.data + i * block.row + std::min(j + PREFETCH, c - 1));
    for (int64_t q = 0; q < r; q += ROWS)
      with_rows(r - q, [&](auto R) {
        Vec tile[ROWS][VECS]{};
        accumulate<R>(rows, u.at(q), block.data + j, block.row, tile);
        for (int a = 0; a < R; a++)
          for (int v = 0; v < VECS; v++) {
            float* to = o + (q + a) * c + j + v * V;
            store(to, load(to) + tile[a][v]);
          }
      });
  }
  for (int64_t q = 0; q < r; q++)
    for (int64_t p = j; p < c; p++) o[q * c + p] += outer_element(u, q, block, p, rows);
}

// out = scale * (the sum of the tasks' partials [r, c]).
inline void store_sum(const RankProducts& t, int64_t tasks, const float* partials,
                      const Parallel& parallel) {
  const int64_t c = t.x.cols, chunk = 256, chunks = round_up(c, chunk) / chunk;
  const auto store_chunk = [&](int64_t index) {
    const int64_t col = index * chunk, count = std::min(chunk, c - col);
    float sums[chunk];
    for (int64_t q = 0; q < t.r; q++) {
      std::memset(sums, 0, sizeof sums);
      for (int64_t task = 0; task < tasks; task++)
        for (int64_t j = 0; j < count; j++) sums[j] += partials[(task * t.r + q) * c + col + j];
      for (int64_t j = 0; j < count; j++) sums[j] *= t.o_scale;
      store_row(*t.o, q, col, sums, count);
    }
  };
  const bool alone = t.o->col_stride == 1 && (tasks + 1) * t.r * c <= ALONE_FLOATS;
  if (!alone) return parallel(chunks, store_chunk);
  for (int64_t index = 0; index < chunks; index++) store_chunk(index);
}

inline void rank_products(const RankProducts& t, const Parallel& parallel) {
  const int64_t m = t.x.rows, c = t.x.cols, r = t.r;
  const int64_t wanted = round_up(BLOCK_FLOATS / std::max<int64_t>(c, 1), ROWS);
  const int64_t block = std::max<int64_t>(ROWS, wanted);
  const int64_t most = std::min(m / MIN_TASK_ROWS, PARTIAL_FLOATS / std::max<int64_t>(r * c, 1));
  const int64_t tasks = std::clamp<int64_t>(most, 1, parallel.threads);
  const Scratch h_panels(t.h ? round_up(r, LANES) * c : 0);
  const Scratch partials(t.o ? tasks * r * c : 0);
  if (t.h) pack(*t.h, 0, c, 0, r, h_panels);
  const bool in_place = t.x.dtype == DType::f32 && !t.dropout;
  parallel(tasks, [&](int64_t task) {
    const Scratch buffer(in_place ? 0 : block * c);
    const int64_t begin = m * task / tasks, end = m * (task + 1) / tasks;
    RowSums o(t.o ? partials + task * r * c : nullptr, r * c, end - begin);
    for (int64_t row = begin; row < end; row += block) {
      const int64_t rows = std::min(block, end - row);
      const Rows x = block_of(t, row, rows, buffer);
      if (t.h) project(x, rows, c, h_panels, r, t.z_scale, t.z + row * r);
      if (t.o) add_outer({t.u + row * r, 1, r}, r, x, rows, c, o.next());
      o.end_block(rows);
    }
    o.finish();
  });
  if (t.o) store_sum(t, tasks, partials, parallel);
}

}  // namespace peft_kernels::PK_ISA
