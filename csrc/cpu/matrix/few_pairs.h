// A few rows of bfloat16 with a weight of 4 bits, looked up where it lies by shuffles of bytes: the
// low bytes and the high ones of the book's values, rounded to bfloat16, are a table each.
#pragma once
#include "pairs.h"

#if defined(__AVX512F__)
namespace peft_kernels::PK_ISA {

constexpr int64_t GROUP = 128;  // codes in a vector; each quarter of it has 32 in their order
constexpr int64_t QUARTER = GROUP / 4;

// Rows of bfloat16 in the order in which codes are looked up, a group of each row after the other:
// group g of row i is at data + i * row + g * rows * GROUP.
struct FewPairs {
  static constexpr int64_t PART = 2 * FewRows::PART;
  const BFloat16* data;
  int64_t row;  // GROUP
  int64_t rows;
};

// A group in that order: of each quarter the even places of its first half, those of its second,
// then the odd ones.
inline void order_group(const BFloat16* from, BFloat16* to) {
  constexpr int64_t STARTS[4] = {0, QUARTER / 2, 1, QUARTER / 2 + 1};
  for (const int64_t start : STARTS)
    for (int64_t quarter = 0; quarter < GROUP; quarter += QUARTER)
      for (int64_t i = 0; i < QUARTER / 2; i += 2) *to++ = from[quarter + start + i];
}

struct ByteTables {
  __m512i low, high;
};

PK_PAIRS PK_INLINE ByteTables tables_of(const float* book) {
  const __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(book));
  const __m128i low = _mm256_cvtepi16_epi8(values);
  const __m128i high = _mm256_cvtepi16_epi8(_mm256_srli_epi16(values, 8));
  return {_mm512_broadcast_i32x4(low), _mm512_broadcast_i32x4(high)};
}

// A group's values, in the order of order_group.
PK_PAIRS PK_INLINE void look_up(ByteTables tables, const uint8_t* from, __m512i (&values)[4]) {
  const __m512i packed = _mm512_loadu_si512(from), mask = _mm512_set1_epi8(15);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
  const __m512i odd = _mm512_and_si512(packed, mask);
  const __m512i even_low = _mm512_shuffle_epi8(tables.low, even);
  const __m512i even_high = _mm512_shuffle_epi8(tables.high, even);
  const __m512i odd_low = _mm512_shuffle_epi8(tables.low, odd);
  const __m512i odd_high = _mm512_shuffle_epi8(tables.high, odd);
  values[0] = _mm512_unpacklo_epi8(even_low, even_high);
  values[1] = _mm512_unpackhi_epi8(even_low, even_high);
  values[2] = _mm512_unpacklo_epi8(odd_low, odd_high);
  values[3] = _mm512_unpackhi_epi8(odd_low, odd_high);
}

// The scales of blocks that follow one another.
inline void block_scales(const Codes& c, int64_t block, int64_t count, float* to) {
  if (!c.nested_scales) {
    with_type(c.scale_type, const_cast<void*>(c.scales), [&](auto* from) {
      for (int64_t i = 0; i < count; i++) to[i] = widen(from[block + i]) * c.unit;
    });
    return;
  }
  for (int64_t i = 0; i < count;) {
    const int64_t outer = part_of(block + i, c.nested_block, c.nested_bits);
    const int64_t end = std::min(count, (outer + 1) * c.nested_block - block);
    const float nested = c.nested_scales[outer];
    for (; i < end; i++) to[i] = c.nested_book[c.scale_codes[block + i]] * nested + c.offset;
  }
}

// Which of the four scales from a group's first on is that of each quarter, one after the other.
inline __m512i scales_of_quarters(int64_t block) {
  if (block == QUARTER) return _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  if (block == 2 * QUARTER)
    return _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_setzero_si512();
}

// totals[i] += x[i] . stretch, for R rows of x. Scales come to the sums of a group: to multiply and
// round the book for each block takes longer than all the look-ups in it.
template <int R>
PK_PAIRS void add_stretch_dots(const Codes& c, Stretch s, FewPairs x, Vec* totals) {
  const ByteTables tables = tables_of(c.book);
  const __m512i by_quarter = scales_of_quarters(c.block);
  const int64_t first = s.line * c.cols + s.start, count = s.end - s.start;
  const int64_t block = first >> c.block_bits, within = first - (block << c.block_bits);
  float scales[FewPairs::PART / R / QUARTER + 4];
  block_scales(c, block, ((within + count - 1) >> c.block_bits) + 1, scales);
  const uint8_t* codes = c.data + first / 2;
  const BFloat16* xs = x.data + s.start * x.rows;
  __m512 found[R]{};
  for (int64_t p = 0; p < count; p += GROUP, xs += x.rows * GROUP) {
    __m512i values[4];
    look_up(tables, codes + p / 2, values);
    __m512 sums[R]{};
    for (int v = 0; v < 4; v++)
      for (int i = 0; i < R; i++) {
        const auto row = (__m512bh)_mm512_loadu_si512(xs + i * GROUP + v * 2 * V);
        sums[i] = _mm512_dpbf16_ps(sums[i], row, (__m512bh)values[v]);
      }
    const float* from = scales + ((within + p) >> c.block_bits);
    const __m512 four = _mm512_castps128_ps512(_mm_loadu_ps(from));
    const __m512 scale = _mm512_permutexvar_ps(by_quarter, four);
    for (int i = 0; i < R; i++) found[i] = _mm512_fmadd_ps(sums[i], scale, found[i]);
  }
  for (int i = 0; i < R; i++) totals[i] += (Vec)found[i];
}

// Whether a few rows' product with this weight is such a one.
inline bool is_of_few_pairs(const Sweep& s) {
  const Codes& c = *s.codes;
  return is_of_pairs(s) && is_split_easily(c) && c.cols % GROUP == 0 && c.block_bits > 0;
}

inline void sweep_few_pairs(const Sweep& s, const Parallel& parallel) {
  const int64_t m = s.x.rows, d = s.x.cols;
  if (s.projection) {
    const Scratch floats(m * d);
    few_project(s, contiguous_rows(s.x, floats), parallel);
  }
  const Scratch buffer(m * d / 2);
  auto* rows = reinterpret_cast<BFloat16*>(static_cast<float*>(buffer));
  for (int64_t i = 0; i < m; i++) {
    const auto* from = reinterpret_cast<const BFloat16*>(s.x.at(i, 0));
    for (int64_t p = 0; p < d; p += GROUP) order_group(from + p, rows + p * m + i * GROUP);
  }
  few_code_dot(s, FewPairs{rows, GROUP, m}, parallel);
}

}  // namespace peft_kernels::PK_ISA
#endif
