// bfloat16 with a weight in codes, in products of the processor's own: two elements that follow one
// another in the depth are a word, and an instruction adds 16 sums of both products (AVX512-BF16).
// The weight's elements are rounded to bfloat16 as they are widened, as if it were kept in that.
#pragma once
#include "isa.h"
#include "low_rank.h"

#if defined(__AVX512F__)
namespace peft_kernels::PK_ISA {

#define PK_PAIRS __attribute__((target("avx512bf16")))

typedef uint32_t Word __attribute__((may_alias));

// Rows of words to broadcast from: pair p of row i is data[i * row + p].
struct PairRows {
  const Word* data;
  int64_t row;
};

// tile[i][j] += sum over pairs p of both products of rows(i, p) and panel[p][j]
template <int R>
PK_PAIRS void accumulate_pairs(int64_t pairs, PairRows rows, const Word* panel,
                               Vec (&tile)[ROWS][VECS]) {
  __m512 sums[R][VECS];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < VECS; v++) sums[i][v] = (__m512)tile[i][v];
  for (int64_t p = 0; p < pairs; p++) {
    __m512bh lanes[VECS];
    for (int v = 0; v < VECS; v++)
      lanes[v] = (__m512bh)_mm512_loadu_si512(panel + p * LANES + v * V);
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
      const int word = static_cast<int>(rows.data[i * rows.row + p]);
      const auto factor = (__m512bh)_mm512_set1_epi32(word);
      for (int v = 0; v < VECS; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], lanes[v], factor);
    }
  }
  for (int i = 0; i < R; i++)
    for (int v = 0; v < VECS; v++) tile[i][v] = (Vec)sums[i][v];
}

PK_PAIRS inline void round_row(const float* from, int64_t count, BFloat16* to) {
  int64_t i = 0;
  for (; i + 2 * V <= count; i += 2 * V) {
    const __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + V);
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(to + i, (__m512i)both);
  }
  for (; i < count; i++) narrow(from[i], to + i);
}

// A run of one block, of whole chunks: the book times the scale is a table of 16 words of 16 bits.
PK_PAIRS inline void round_nibbles(const Codes& c, int64_t start, int64_t count, float scale,
                                   BFloat16* to) {
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(c.book), _mm512_set1_ps(scale));
  const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(scaled));
  for (int64_t i = 0; i < count; i += CHUNK) {
    const auto* from = reinterpret_cast<const __m128i*>(c.data + (start + i) / 2);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
    // The look-up takes the low 5 bits, and both halves of the table are alike.
    const __m512i first = _mm512_srli_epi32(bytes, 4), second = _mm512_slli_epi32(bytes, 16);
    const __m512i codes = _mm512_or_si512(first, second);
    _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(codes, table));
  }
}

// to[i] = element first + i, counted row by row, of one row.
inline void round_codes(const Codes& c, int64_t first, int64_t count, BFloat16* to) {
  if (is_split_easily(c) && first % CHUNK == 0 && count % CHUNK == 0) {
    auto [block, left] = in_block(c, first);
    for (int64_t i = 0, run; i < count; i += run, left = c.block) {
      run = std::min(count - i, left);
      round_nibbles(c, first + i, run, block_scale(c, block++), to + i);
    }
    return;
  }
  alignas(64) float widened[WIDENED_DEPTH];
  for (int64_t i = 0, run; i < count; i += run) {
    run = std::min(count - i, WIDENED_DEPTH);
    widen_codes(c, first + i, run, widened);
    round_row(widened, run, to + i);
  }
}

// Panels of W in pairs of its rows: columns [col, col + count), count at most WIDENED_DEPTH.
inline void pack_code_pairs(const Codes& c, int64_t pairs, int64_t col, int64_t count,
                            Word* panels) {
  alignas(64) BFloat16 rows[2][WIDENED_DEPTH];
  std::memset(rows, 0, sizeof rows);
  for (int64_t p = 0; p < pairs; p++) {
    for (int i = 0; i < 2; i++) round_codes(c, (2 * p + i) * c.cols + col, count, rows[i]);
    for (int64_t j = 0; j < count; j += V) {
      Word* to = panels + j / LANES * LANES * pairs + p * LANES + j % LANES;
      for (int64_t v = 0; v < V; v++)
        to[v] = rows[0][j + v].bits | static_cast<Word>(rows[1][j + v].bits) << 16;
    }
  }
}

// Whether a product of so many rows is one of pairs.
inline bool is_of_pairs(const Sweep& s) {
  const Matrix& x = s.x;
  return multiplies_bf16() && s.codes && x.dtype == DType::bf16 && x.col_stride == 1 &&
         x.cols % 2 == 0 && x.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
}

inline PairRows pairs_of(const Matrix& x, int64_t row) {
  return {reinterpret_cast<const Word*>(x.at(row, 0)), x.row_stride / 2};
}

}  // namespace peft_kernels::PK_ISA
#endif
