// S = x A^T of rows that have different adapters: dot products by lanes of p, of a few rows of x by
// a few of A, so that reading either pays more than once.
#pragma once
#include "paged.h"
#include "matrix/pairs.h"

namespace peft_kernels::PK_ISA {

// Accumulators that the registers hold: AVX2 has 16, AVX-512 32.
constexpr int64_t DOT_ROWS = V < 16 ? 3 : 4, DOT_COLS = 4;

// sums[j] = the sum of lanes[j].
template <int C>
PK_INLINE void add_up(const Vec (&lanes)[C], float (&sums)[DOT_COLS]) {
  Vec all[DOT_COLS]{};
  for (int j = 0; j < C; j++) all[j] = lanes[j];
  const Four found = sums_of(all[0], all[1], all[2], all[3]);
  std::memcpy(sums, &found, sizeof found);
}

// sums[i][j] = x[i] . g[j], R rows of x by C rows of g.
template <int R, int C, class T>
PK_INLINE void dots(int64_t depth, const float* const* x, const T* g, int64_t g_row,
                    float (&sums)[DOT_ROWS][DOT_COLS]) {
  const int64_t whole = depth / V * V;
  Vec totals[R][C]{};
  for (int64_t p = 0; p < whole;) {
    Vec acc[R][C]{};
    for (const int64_t end = std::min(whole, p + DOT_RUN * V); p < end; p += V) {
      Vec gs[C];
      for (int j = 0; j < C; j++) gs[j] = load(g + j * g_row + p);
      for (int i = 0; i < R; i++) {
        const Vec xs = load(x[i] + p);
        for (int j = 0; j < C; j++) acc[i][j] += xs * gs[j];
      }
    }
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) totals[i][j] += acc[i][j];
  }
  for (int i = 0; i < R; i++) {
    add_up(totals[i], sums[i]);
    for (int j = 0; j < C; j++) {
      float rest = 0;
      for (int64_t q = whole; q < depth; q++) rest += x[i][q] * widen(g[j * g_row + q]);
      sums[i][j] += rest;
    }
  }
}

#if defined(__AVX512F__)
// The same of bfloat16, in products of two elements that follow one another.
template <int R, int C>
PK_PAIRS inline void dots(int64_t depth, const BFloat16* const* x, const BFloat16* g, int64_t g_row,
                          float (&sums)[DOT_ROWS][DOT_COLS]) {
  constexpr int64_t STEP = 2 * V;
  __m512 totals[R][C]{};
  for (int64_t p = 0; p < depth;) {
    __m512 acc[R][C]{};
    for (const int64_t end = std::min(depth, p + DOT_RUN * STEP); p < end; p += STEP) {
      const auto mask = static_cast<__mmask32>(depth - p < STEP ? (1u << (depth - p)) - 1 : ~0u);
      __m512bh gs[C];
      for (int j = 0; j < C; j++)
        gs[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, g + j * g_row + p);
      for (int i = 0; i < R; i++) {
        const auto xs = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[i] + p);
        for (int j = 0; j < C; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], xs, gs[j]);
      }
    }
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) totals[i][j] = _mm512_add_ps(totals[i][j], acc[i][j]);
  }
  for (int i = 0; i < R; i++) {
    Vec lanes[C];
    for (int j = 0; j < C; j++) lanes[j] = (Vec)totals[i][j];
    add_up(lanes, sums[i]);
  }
}
#endif

// The unit's rows as floats under dropout: where they lie, or copied to buffer.
inline void float_pointers(const Matrix& x, const Group& group, bool drops, const Unit& unit,
                           const int64_t* rows, float* buffer, const float** pointers) {
  const int64_t k = x.cols;
  const bool copies = drops || x.dtype != DType::f32;
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

// The unit's part of S, from its rows of x.
template <class T, class X>
inline void shrink_unit(const Shrink& t, const Unit& unit, const X* const* x) {
  const Group& group = t.work.groups[unit.group];
  const int64_t count = unit.end - unit.begin, step = t.pages.data.row_stride;
  const int64_t* rows = t.work.rows + unit.begin;
  const float factor = t.scaled ? group.scale : 1;
  float sums[DOT_ROWS][DOT_COLS];
  for (int64_t page = unit.part_begin; page < unit.part_end; page++) {
    const T* a = t.pages.first<T>(group.slot, page);
    for (int64_t q = 0; q < page_rows(group, page); q += DOT_COLS, a += DOT_COLS * step)
      with_count<DOT_COLS>(page_rows(group, page) - q, [&](auto C) {
        for_tiles<DOT_ROWS>(count, [&](int64_t i, auto R) {
          dots<R, C>(t.x.cols, x + i, a, step, sums);
          for (int b = 0; b < R; b++) {
            float* s = t.s.data + rows[i + b] * t.s.stride + page * PAGE + q;
            for (int c = 0; c < C; c++) s[c] = sums[b][c] * factor;
          }
        });
      });
  }
}

inline void shrink_any(const Shrink& t, const Unit& unit) {
  const Group& group = t.work.groups[unit.group];
  const int64_t count = unit.end - unit.begin;
  const bool drops = t.masked && group.dropout.threshold != 0;
#if defined(__AVX512F__)
  if (t.in_pairs && !drops) {
    const BFloat16* x[SHRINK_ROWS];
    for (int64_t i = 0; i < count; i++)
      x[i] = reinterpret_cast<const BFloat16*>(t.x.at(t.work.rows[unit.begin + i], 0));
    return shrink_unit<BFloat16>(t, unit, x);
  }
#endif
  const bool copies = drops || t.x.dtype != DType::f32;
  const Scratch buffer(copies ? count * t.x.cols : 0);
  const float* x[SHRINK_ROWS];
  float_pointers(t.x, group, drops, unit, t.work.rows, buffer, x);
  with_type(t.pages.data.dtype, nullptr, [&]<class T>(T*) { shrink_unit<T>(t, unit, x); });
}

inline void shrink(const Shrink* banks, int64_t count, const Parallel& parallel) {
  for_units(banks, count, parallel, shrink_any);
}

// S, and then y += S B, in one call of the threads: none of them sleeps between the two.
inline void update(const Shrink* shrinks, const Expand* expands, int64_t count,
                   const Parallel& parallel) {
  const int64_t most = std::max(units_of(shrinks, count), units_of(expands, count));
  const int64_t threads = std::min<int64_t>(parallel.threads, most);
  if (!threads) return;
  Shares first(shrinks, count, threads, shrink_any);
  Shares second(expands, count, threads, expand_unit);
  parallel(threads, [&](int64_t thread) {
    first.run(thread);
    first.wait();
    second.run(thread);
  });
}

}  // namespace peft_kernels::PK_ISA
