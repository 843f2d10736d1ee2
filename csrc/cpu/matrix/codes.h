// Rows of a weight that lies in codes, widened to floats where a kernel needs them.
#pragma once
#include <utility>

#include "blocks.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t WIDENED_DEPTH = 128;  // of a panel's columns at once: they stay in L1

inline float number_at(const void* numbers, DType dtype, int64_t i) {
  float found = 0;
  with_type(dtype, const_cast<void*>(numbers), [&](auto* from) { found = widen(from[i]); });
  return found;
}

inline float block_scale(const Codes& c, int64_t block) {
  if (!c.nested_scales) return number_at(c.scales, c.scale_type, block) * c.unit;
  const float nested = c.nested_scales[block / c.nested_block];
  return c.nested_book[c.scale_codes[block]] * nested + c.offset;
}

// The block of an element, and how many elements of it follow from there on in its row.
struct InBlock {
  int64_t block, left;
};
inline InBlock in_block(const Codes& c, int64_t element) {
  if (c.block_rows == 1) return {element / c.block, c.block - element % c.block};
  const int64_t row = element / c.cols, col = element % c.cols;
  const int64_t blocks = (c.cols + c.block - 1) / c.block;
  return {row / c.block_rows * blocks + col / c.block, c.block - col % c.block};
}

// Whole runs of 16 codes, of which the first is even; returns how many it widened.
inline int64_t widen_nibbles(const Codes& c, int64_t first, int64_t count, float scale, float shift,
                             float* to) {
#if defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(scale), more = _mm256_set1_ps(shift);
  const __m256 front = _mm256_loadu_ps(c.book), back = _mm256_loadu_ps(c.book + 8);
  const auto look_up = [&](__m256i codes) {  // by the low four bits
    const __m256 low = _mm256_permutevar8x32_ps(front, codes);
    const __m256 high = _mm256_permutevar8x32_ps(back, codes);
    const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_fmadd_ps(_mm256_blendv_ps(low, high, is_high), factor, more);
  };
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const auto* from = reinterpret_cast<const __m128i*>(c.data + (first + i) / 2);
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from));
    const __m256 even = look_up(_mm256_srli_epi32(bytes, 4)), odd = look_up(bytes);
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(to + i, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(to + i + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
  return i;
#else
  (void)c, (void)first, (void)count, (void)scale, (void)shift, (void)to;
  return 0;
#endif
}

// 4 bits of exponent and 3 of mantissa: a float's own, but for a bias of 7 where that has 127.
inline float widen_e4m3(uint8_t bits) {
  const uint32_t magnitude = bits & 127, sign = bits & 128;
  const uint32_t wide = sign << 24 | (magnitude == 127 ? 0x7fc00000 : magnitude << 20);
  float value;
  std::memcpy(&value, &wide, 4);
  return value * 0x1p120f;
}

inline float value_of(const Codes& c, int64_t element) {
  if (c.layout == Layout::bytes) return static_cast<int8_t>(c.data[element]);
  if (c.layout == Layout::e4m3) return widen_e4m3(c.data[element]);
  const int byte = c.data[element / 2];
  return c.book[element % 2 ? byte & 15 : byte >> 4];
}

// Elements first to first + count of one block.
inline void widen_run(const Codes& c, int64_t first, int64_t count, float scale, float shift,
                      float* to) {
  if (c.layout == Layout::bytes) {
    const auto* from = reinterpret_cast<const int8_t*>(c.data) + first;
    for (int64_t i = 0; i < count; i++) to[i] = from[i] * scale + shift;
  } else if (c.layout == Layout::e4m3) {
    for (int64_t i = 0; i < count; i++) to[i] = widen_e4m3(c.data[first + i]) * scale + shift;
  } else {
    int64_t i = 0;
    if (first % 2 && count) to[i++] = value_of(c, first) * scale + shift;
    i += widen_nibbles(c, first + i, count - i, scale, shift, to + i);
    for (; i < count; i++) to[i] = value_of(c, first + i) * scale + shift;
  }
}

// to[i] = element first + i, counted row by row, of one row.
inline void widen_codes(const Codes& c, int64_t first, int64_t count, float* to) {
  if (is_in_blocks(c)) return widen_blocks(c, first, count, to);
  for (int64_t i = 0; i < count;) {
    const auto [block, left] = in_block(c, first + i);
    const int64_t run = std::min(count - i, left);
    const float shift = c.shifts ? number_at(c.shifts, c.scale_type, block) : 0;
    widen_run(c, first + i, run, block_scale(c, block), shift, to + i);
    i += run;
  }
}

// Panels of W^T: rows [col, col + count) of W are columns.
inline void pack_code_rows(const Codes& c, int64_t col, int64_t count, float* panels) {
  const int64_t depth = c.cols, whole = count / LANES * LANES;
  alignas(64) float rows[LANES * WIDENED_DEPTH];
  if (whole < count) std::memset(panels + whole * depth, 0, depth * LANES * sizeof(float));
  for (int64_t j = 0; j < count; j += LANES) {
    const int64_t lanes = std::min<int64_t>(LANES, count - j);
    for (int64_t p = 0; p < depth; p += WIDENED_DEPTH) {
      const int64_t stretch = std::min(WIDENED_DEPTH, depth - p);
      for (int64_t i = 0; i < lanes; i++)
        widen_codes(c, (col + j + i) * depth + p, stretch, rows + i * WIDENED_DEPTH);
      pack_transposed(reinterpret_cast<const Float*>(rows), WIDENED_DEPTH, stretch, lanes,
                      panels + j * depth + p * LANES);
    }
  }
}

// Panels of W: its columns [col, col + count), count at most WIDENED_DEPTH.
inline void pack_code_columns(const Codes& c, int64_t depth, int64_t col, int64_t count,
                              float* panels) {
  const int64_t whole = count / LANES * LANES;
  alignas(64) float row[WIDENED_DEPTH];
  if (whole < count) std::memset(panels + whole * depth, 0, depth * LANES * sizeof(float));
  for (int64_t p = 0; p < depth; p++) {
    widen_codes(c, p * c.cols + col, count, row);
    for (int64_t j = 0; j < count; j += LANES)
      std::memcpy(panels + j * depth + p * LANES, row + j,
                  std::min<int64_t>(LANES, count - j) * sizeof(float));
  }
}

// ---- a few rows --------------------------------------------------------------------------------
// Codes are looked up where they lie, a vector of bytes at a time. That gives the first codes of V
// bytes and then the second ones, so what is multiplied with them lies in that order too: split.

constexpr int64_t CHUNK = 2 * V;       // codes
constexpr int64_t SPLIT_RUN = 64 * V;  // products of V lanes that are summed one after the other

#if defined(__AVX2__)
constexpr bool READS_CODES = true;
#else
constexpr bool READS_CODES = false;  // without vectors' shuffles a table is read one by one
#endif

// Whether the lines of such a weight are whole chunks of one scale each.
inline bool is_split_easily(const Codes& c) {
  return READS_CODES && c.layout == Layout::nibbles && !c.shifts && c.block_rows == 1 &&
         c.cols % CHUNK == 0 && c.block % CHUNK == 0 &&
         (c.cols % c.block == 0 || c.block % c.cols == 0);
}

#if defined(__AVX512F__)
struct Book {
  Vec values;
  explicit Book(const float* from) : values(load(from)) {}
  PK_INLINE Book times(float factor) const { return Book(values * splat(factor)); }
  PK_INLINE Vec at(WordVec codes) const {  // by the low four bits
    return (Vec)_mm512_permutexvar_ps((__m512i)codes, (__m512)values);
  }

 private:
  explicit Book(Vec v) : values(v) {}
};
PK_INLINE WordVec bytes(const uint8_t* from) {
  return (WordVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#elif defined(__AVX2__)
struct Book {
  Vec front, back;
  explicit Book(const float* from) : front(load(from)), back(load(from + 8)) {}
  PK_INLINE Book times(float factor) const { return Book(front * factor, back * factor); }
  PK_INLINE Vec at(WordVec codes) const {  // by the low four bits
    const __m256 low = _mm256_permutevar8x32_ps((__m256)front, (__m256i)codes);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)back, (__m256i)codes);
    return (Vec)_mm256_blendv_ps(low, high, _mm256_castsi256_ps((__m256i)(codes << 28)));
  }

 private:
  Book(Vec f, Vec b) : front(f), back(b) {}
};
PK_INLINE WordVec bytes(const uint8_t* from) {
  return (WordVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
#endif

// A row with the even and the odd places of each chunk apart, and back.
inline void split_row(const float* from, int64_t count, float* to) {
  for (int64_t p = 0; p < count; p += CHUNK)
    for (int64_t i = 0; i < V; i++)
      to[p + i] = from[p + 2 * i], to[p + V + i] = from[p + 2 * i + 1];
}
inline void unsplit_row(const float* from, int64_t count, float* to) {
  for (int64_t p = 0; p < count; p += CHUNK)
    for (int64_t i = 0; i < V; i++)
      to[p + 2 * i] = from[p + i], to[p + 2 * i + 1] = from[p + V + i];
}

#if defined(__AVX2__)
// totals[i][0] += x[i] . line, for R split rows of x and a line of the weight.
template <int R>
PK_INLINE void add_code_dots(const Codes& c, int64_t line, const float* x, Vec (&totals)[R][1]) {
  const int64_t d = c.cols, stretch = std::min(c.block, d);
  const uint8_t* from = c.data + line * d / 2;
  const Book book(c.book);
  Vec sums[R]{};
  for (int64_t p = 0; p < d; p += stretch) {
    const Book scaled = book.times(block_scale(c, (line * d + p) / c.block));
    for (int64_t q = p; q < p + stretch; q += CHUNK) {
      const WordVec codes = bytes(from + q / 2);
      const Vec even = scaled.at(codes >> 4), odd = scaled.at(codes);
      for (int i = 0; i < R; i++) {
        sums[i] += load(x + i * d + q) * even;
        sums[i] += load(x + i * d + q + V) * odd;
      }
    }
    if ((p + stretch) % SPLIT_RUN == 0 || p + stretch == d)
      for (int i = 0; i < R; i++) totals[i][0] += std::exchange(sums[i], Vec{});
  }
}

// sums[i] += x[i] line, for R rows of split sums and the columns [col, col + count) of a line.
template <int R>
PK_INLINE void add_code_line(const Codes& c, int64_t line, int64_t col, int64_t count,
                             const float* x, int64_t x_row, float* sums, int64_t sums_row) {
  const Book book(c.book);
  int64_t element = line * c.cols + col;
  for (int64_t j = 0; j < count;) {
    const int64_t end = std::min(count, j + c.block - element % c.block);
    const Book scaled = book.times(block_scale(c, element / c.block));
    element += end - j;
    for (; j < end; j += CHUNK) {
      const WordVec codes = bytes(c.data + (line * c.cols + col + j) / 2);
      const Vec even = scaled.at(codes >> 4), odd = scaled.at(codes);
      for (int i = 0; i < R; i++) {
        float* to = sums + i * sums_row + j;
        const Vec factor = splat(x[i * x_row]);
        store(to, load(to) + factor * even);
        store(to + V, load(to + V) + factor * odd);
      }
    }
  }
}
#endif

}  // namespace peft_kernels::PK_ISA
