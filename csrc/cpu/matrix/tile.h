// The register tile every product is made of, and the buffers that feed it.
//
// A tile is ROWS broadcast rows by LANES vector lanes: tile[i][j] += sum_p a(i, p) * b(p, j), with
// a read where it lies (or from a panel converted to float) and b from a packed [p][LANES] panel.
#pragma once
#include <cstdlib>
#include <new>
#include <type_traits>

#include "simd.h"

namespace peft_kernels::PK_ISA {

// The accumulators, VECS vectors of b and a broadcast fill the registers: AVX2 has 16, AVX-512 32.
#if defined(__AVX512F__)
constexpr int ROWS = 12;
#else
constexpr int ROWS = 6;
#endif
constexpr int VECS = 2;
constexpr int LANES = VECS * V;
constexpr int64_t RUN = 64;        // products that are summed one after the other, at most
constexpr int64_t LEAST_RUN = 32;  // of a depth beyond RUN
constexpr int64_t STRETCH = 16 * RUN;  // products whose runs are summed one after the other
constexpr int PREFETCH_ROWS = 16;  // ahead of the row being packed

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// 64-byte aligned floats. Freed at scope exit, so glibc hands the same pages out on the next call.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4 + 64, 64)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() const { return data_; }

 private:
  float* data_;
};

// Rows of floats to broadcast from: element (i, p) is data[i * row + p * step].
struct Rows {
  const float* data;
  int64_t row, step;
  Rows at(int64_t i, int64_t p = 0) const { return {data + i * row + p * step, row, step}; }
};

template <int R, bool UNIT_STEP>
PK_INLINE void accumulate_run(int64_t depth, Rows a, const float* b, int64_t b_step,
                              Vec (&tile)[ROWS][VECS]) {
  const int64_t step = UNIT_STEP ? 1 : a.step;
  for (int64_t p = 0; p < depth; p++) {
    Vec lanes[VECS];
    for (int v = 0; v < VECS; v++) lanes[v] = load(b + p * b_step + v * V);
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
      const Vec factor = splat(a.data[i * a.row + p * step]);
      for (int v = 0; v < VECS; v++) tile[i][v] += factor * lanes[v];
    }
  }
}

// to += from
template <int R>
PK_INLINE void add_tile(const Vec (&from)[ROWS][VECS], Vec (&to)[ROWS][VECS]) {
  for (int i = 0; i < R; i++)
    for (int v = 0; v < VECS; v++) to[i][v] += from[i][v];
}

// BLAS sums the products of a few rows by the lanes of a vector, a short depth by shorter runs.
inline int64_t run_of(int64_t depth) {
  return depth <= RUN ? RUN : std::clamp(depth / 16, LEAST_RUN, RUN);
}

// Sums of a stretch's sums of runs: the rounding error grows with the root of what is summed one
// after the other, not of the depth. Adding a run to the tile takes 1 or 2 hundredths of the run.
template <int R, bool UNIT_STEP>
PK_INLINE void accumulate(int64_t depth, Rows a, const float* b, int64_t b_step,
                          Vec (&tile)[ROWS][VECS]) {
  const int64_t run = run_of(depth);
  Vec before[ROWS][VECS];  // the sums of the stretches before, of a depth beyond one
  for (int64_t p = 0; p < depth; p += run) {
    if (p % STRETCH == 0 && p) {
      if (p > STRETCH) add_tile<R>(before, tile);
      std::memcpy(before, tile, sizeof tile);
      std::memset(tile, 0, sizeof tile);
    }
    Vec sums[ROWS][VECS]{};
    accumulate_run<R, UNIT_STEP>(std::min(run, depth - p), a.at(0, p), b + p * b_step, b_step, sums);
    add_tile<R>(sums, tile);
  }
  if (depth > STRETCH) add_tile<R>(before, tile);
}

template <int R>
PK_INLINE void accumulate(int64_t depth, Rows a, const float* b, int64_t b_step,
                          Vec (&tile)[ROWS][VECS]) {
  if (a.step == 1)
    accumulate<R, true>(depth, a, b, b_step, tile);
  else
    accumulate<R, false>(depth, a, b, b_step, tile);
}

// The same in memory: totals += sums; sums = 0.
inline void end_run(int64_t count, float* sums, float* totals) {
  for (int64_t i = 0; i < count; i++) totals[i] += sums[i];
  std::memset(sums, 0, count * sizeof(float));
}

// Calls f with rows as a compile-time constant, 1 to ROWS.
template <int R = ROWS, class F>
PK_INLINE void with_rows(int64_t rows, F f) {
  if constexpr (R > 1)
    if (rows < R) return with_rows<R - 1>(rows, f);
  f(std::integral_constant<int, R>{});
}

#if defined(__AVX2__)
PK_INLINE void transpose(Block (&v)[B]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      b[4 * i + 2 * j] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0x44);
      b[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0xEE);
    }
  for (int j = 0; j < 4; j++) {
    v[j] = (Block)_mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    v[4 + j] = (Block)_mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
}
#else
PK_INLINE void transpose(Block (&v)[B]) {
  for (int i = 0; i < B; i++)
    for (int j = 0; j < i; j++) std::swap(v[i][j], v[j][i]);
}
#endif

// B x B elements of a panel, with so many columns filled: panel[p * LANES + j] = from(p, j).
template <class T>
PK_INLINE void pack_block(const T* from, int64_t col_stride, int64_t filled, float* panel) {
  Block block[B]{};
  for (int64_t j = 0; j < filled; j++) block[j] = load_block(from + j * col_stride);
  transpose(block);
  for (int p = 0; p < B; p++) std::memcpy(panel + p * LANES, &block[p], B * 4);
}

// One panel: panel[p * LANES + j] = from(p, j) for count <= LANES columns of contiguous depth.
// Cache lines are used up one after the other: columns a power of 2 apart evict each other from L1.
template <class T>
PK_INLINE void pack_transposed(const T* from, int64_t col_stride, int64_t depth, int64_t count,
                               float* panel) {
  constexpr int64_t LINE = 64 / sizeof(T);
  const int64_t whole = depth / B * B;
  for (int64_t line = 0; line < whole; line += LINE)
    for (int64_t j = 0; j < count; j += B)
      for (int64_t p = line; p < std::min(line + LINE, whole); p += B) {
        const T* block = from + j * col_stride + p;
        float* to = panel + p * LANES + j;
        // A count known to the compiler takes 0.6 of the time.
        if (count - j >= B)
          pack_block(block, col_stride, B, to);
        else
          pack_block(block, col_stride, count - j, to);
      }
  for (int64_t p = whole; p < depth; p++)
    for (int64_t j = 0; j < count; j++) panel[p * LANES + j] = widen(from[p + j * col_stride]);
}

// Columns as panels [column / LANES][depth][LANES] of floats, 0 in the lanes beyond count.
template <class T>
void pack_typed(const T* from, int64_t row_stride, int64_t col_stride, int64_t depth, int64_t count,
                float* panels) {
  const int64_t whole = count / LANES * LANES;
  if (whole < count) std::memset(panels + whole * depth, 0, depth * LANES * sizeof(float));
  if (col_stride == 1) {
    for (int64_t p = 0; p < depth; p++) {
      const T* row = from + p * row_stride;
      for (int64_t j = 0; j < count; j += LANES) {
        __builtin_prefetch(row + PREFETCH_ROWS * row_stride + j);  // each row is another page
        widen_row(row + j, panels + j * depth + p * LANES, std::min<int64_t>(LANES, count - j));
      }
    }
    return;
  }
  for (int64_t j = 0; j < count; j += LANES) {
    float* panel = panels + j * depth;
    const int64_t lanes = std::min<int64_t>(LANES, count - j);
    if (row_stride == 1) {
      pack_transposed(from + j * col_stride, col_stride, depth, lanes, panel);
      continue;
    }
    for (int64_t p = 0; p < depth; p++)
      for (int64_t i = 0; i < lanes; i++)
        panel[p * LANES + i] = widen(from[p * row_stride + (j + i) * col_stride]);
  }
}

// Packs rows [row, row + depth) x columns [col, col + count) of a matrix.
inline void pack(const Matrix& m, int64_t row, int64_t depth, int64_t col, int64_t count,
                 float* panels) {
  with_type(m.dtype, m.at(row, col), [&](auto* from) {
    pack_typed(from, m.row_stride, m.col_stride, depth, count, panels);
  });
}

// A block of a matrix as float rows: in place where it already is float, else converted to buffer.
inline Rows float_rows(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols,
                       float* buffer) {
  if (m.dtype == DType::f32)
    return {reinterpret_cast<float*>(m.at(row, col)), m.row_stride, m.col_stride};
  with_type(m.dtype, m.at(row, col), [&](auto* from) {
    for (int64_t i = 0; i < rows; i++) {
      if (m.col_stride == 1) {
        widen_row(from + i * m.row_stride, buffer + i * cols, cols);
        continue;
      }
      for (int64_t j = 0; j < cols; j++)
        buffer[i * cols + j] = widen(from[i * m.row_stride + j * m.col_stride]);
    }
  });
  return {buffer, cols, 1};
}

// out(row, col + j) = values[j], rounded to out's dtype.
inline void store_row(const Matrix& out, int64_t row, int64_t col, const float* values,
                      int64_t count) {
  with_type(out.dtype, out.at(row, col), [&](auto* to) {
    if (out.col_stride == 1) return narrow_row(values, to, count);
    for (int64_t j = 0; j < count; j++) narrow(values[j], to + j * out.col_stride);
  });
}

}  // namespace peft_kernels::PK_ISA
