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

// A division takes as long as widening 20 codes does.
PK_INLINE int64_t part_of(int64_t i, int64_t part, int bits) {
  return bits < 0 ? i / part : i >> bits;
}

PK_INLINE float block_scale(const Codes& c, int64_t block) {
  if (!c.nested_scales) return number_at(c.scales, c.scale_type, block) * c.unit;
  const float nested = c.nested_scales[part_of(block, c.nested_block, c.nested_bits)];
  return c.nested_book[c.scale_codes[block]] * nested + c.offset;
}
PK_INLINE float block_shift(const Codes& c, int64_t block) {
  return c.shifts ? number_at(c.shifts, c.scale_type, block) : 0;
}

// The block of an element, and how many elements of it follow from there on in its row.
struct InBlock {
  int64_t block, left;
};
PK_INLINE InBlock in_block(const Codes& c, int64_t element) {
  if (c.block_rows == 1) {
    const int64_t block = part_of(element, c.block, c.block_bits);
    return {block, (block + 1) * c.block - element};
  }
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

// V codes of a byte each.
PK_INLINE Vec values_at(Layout layout, const uint8_t* from) {
  if (layout == Layout::bytes) return floats(signed_bytes(from));
  const WordVec codes = bytes(from), magnitude = codes & 127;
  const WordVec wide = magnitude == 127 ? WordVec{} + 0x7fc00000 : magnitude << 20;
  return (Vec)(wide | (codes & 128) << 24) * 0x1p120f;
}

// Elements first to first + count of one block.
inline void widen_run(const Codes& c, int64_t first, int64_t count, float scale, float shift,
                      float* to) {
  int64_t i = 0;
  if (c.layout == Layout::nibbles) {
    if (first % 2 && count) to[i++] = value_of(c, first) * scale + shift;
    i += widen_nibbles(c, first + i, count - i, scale, shift, to + i);
  } else {
    for (; i + V <= count; i += V)
      store(to + i, values_at(c.layout, c.data + first + i) * scale + shift);
  }
  for (; i < count; i++) to[i] = value_of(c, first + i) * scale + shift;
}

// to[i] = element first + i, counted row by row, of one row.
inline void widen_codes(const Codes& c, int64_t first, int64_t count, float* to) {
  if (is_in_blocks(c)) return widen_blocks(c, first, count, to);
  auto [block, left] = in_block(c, first);
  for (int64_t i = 0; i < count; block++, left = c.block) {
    const int64_t run = std::min(count - i, left);
    widen_run(c, first + i, run, block_scale(c, block), block_shift(c, block), to + i);
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
    const int64_t first = p * c.cols + col;
    float* to = panels + p * LANES;
    const auto [block, left] = is_in_blocks(c) ? InBlock{0, 0} : in_block(c, first);
    if (left >= count) {
      const float scale = block_scale(c, block), shift = block_shift(c, block);
      for (int64_t j = 0; j < count; j += LANES)
        widen_run(c, first + j, std::min<int64_t>(LANES, count - j), scale, shift, to + j * depth);
      continue;
    }
    widen_codes(c, first, count, row);
    for (int64_t j = 0; j < count; j += LANES)
      std::memcpy(to + j * depth, row + j, std::min<int64_t>(LANES, count - j) * sizeof(float));
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
  Book() = default;
  explicit Book(const float* from) : values(load(from)) {}
  PK_INLINE Book times(float factor) const { return Book(values * splat(factor)); }
  PK_INLINE Vec at(WordVec codes) const {  // by the low four bits
    return (Vec)_mm512_permutexvar_ps((__m512i)codes, (__m512)values);
  }

 private:
  explicit Book(Vec v) : values(v) {}
};
#elif defined(__AVX2__)
struct Book {
  Vec front, back;
  Book() = default;
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

// What is summed of V codes at a time one after the other, before it goes into totals.
constexpr int64_t BLOCK_RUN = 64 * V;

// Sums of a row side by side, so that none waits for the one before; more rows have enough of them.
template <int R>
constexpr int CHAINS = R <= 2 ? 2 : 1;

template <int R>
PK_INLINE void end_chains(Vec (&sums)[R][CHAINS<R>], Vec* totals) {
  for (int i = 0; i < R; i++)
    for (int s = 0; s < CHAINS<R>; s++) totals[i] += std::exchange(sums[i][s], Vec{});
}

// Rows of floats, x[i] at data + i * row.
struct FewRows {
  static constexpr int64_t PART = 4 * 1024;  // elements of all rows that stay in L1
  const float* data;
  int64_t row;
};

// A stretch of a line of the weight, of whole blocks of GGUF's and whole chunks.
struct Stretch {
  int64_t line, start, end;
};

// totals[i] += x[i] . stretch, for R rows of x, in blocks of GGUF's.
template <int R, Layout L>
PK_INLINE void add_block_dots(const Codes& c, Stretch s, FewRows x, Vec* totals) {
  constexpr int PIECES = L >= Layout::q4_K ? 8 : 1;
  const int64_t first = s.line * c.cols / PIECE;
  Vec sums[R][CHAINS<R>]{};
  for (int64_t p = s.start; p < s.end; p += PIECES * PIECE) {
#pragma GCC unroll 8
    for (int piece = 0; piece < PIECES; piece++) {
      Vec values[PIECE_VECS];
      read_piece<L>(c.data, first + p / PIECE + piece, values);
      for (int i = 0; i < R; i++)
        for (int v = 0; v < PIECE_VECS; v++)
          sums[i][v % CHAINS<R>] += load(x.data + i * x.row + p + piece * PIECE + v * V) * values[v];
    }
    const int64_t end = p + PIECES * PIECE;
    if (end % BLOCK_RUN == 0 || end == s.end) end_chains<R>(sums, totals);
  }
}

// The same of codes of a byte, d a multiple of V and so are the blocks.
template <int R, Layout L>
PK_INLINE void add_byte_dots(const Codes& c, Stretch s, FewRows x, Vec* totals) {
  const int64_t d = c.cols;
  for (int64_t p = s.start; p < s.end;) {
    const auto [block, left] = in_block(c, s.line * d + p);
    const int64_t end = std::min({s.end, p + left, p + BLOCK_RUN});
    Vec sums[R]{}, others[R]{}, rows[R]{};
    const auto add = [&](int64_t q, Vec (&to)[R]) {
      const Vec values = values_at(L, c.data + s.line * d + q);
      for (int i = 0; i < R; i++) {
        const Vec xs = load(x.data + i * x.row + q);
        to[i] += xs * values;
        if (c.shifts) rows[i] += xs;
      }
    };
    int64_t q = p;
    for (; q + 2 * V <= end; q += 2 * V) add(q, sums), add(q + V, others);
    if (q < end) add(q, sums);
    const Vec scale = splat(block_scale(c, block));
    const Vec shift = splat(block_shift(c, block));
    for (int i = 0; i < R; i++) totals[i] += (sums[i] + others[i]) * scale + rows[i] * shift;
    p = end;
  }
}

// Whether the lines of such a weight are read where they lie, in the order they have.
inline bool is_read_in_order(const Codes& c) {
  const bool in_bytes = c.layout == Layout::bytes || c.layout == Layout::e4m3;
  return is_in_blocks(c) || (in_bytes && c.cols % V == 0 && c.block % V == 0);
}

template <int R>
PK_INLINE void add_ordered_dots(const Codes& c, Stretch s, FewRows x, Vec* totals) {
  switch (c.layout) {
    case Layout::nibbles: return;
    case Layout::bytes: return add_byte_dots<R, Layout::bytes>(c, s, x, totals);
    case Layout::e4m3: return add_byte_dots<R, Layout::e4m3>(c, s, x, totals);
    case Layout::q8_0: return add_block_dots<R, Layout::q8_0>(c, s, x, totals);
    case Layout::q4_0: return add_block_dots<R, Layout::q4_0>(c, s, x, totals);
    case Layout::q4_1: return add_block_dots<R, Layout::q4_1>(c, s, x, totals);
    case Layout::q4_K: return add_block_dots<R, Layout::q4_K>(c, s, x, totals);
    case Layout::q6_K: return add_block_dots<R, Layout::q6_K>(c, s, x, totals);
  }
}

#if defined(__AVX2__)
// totals[i] += x[i] . stretch, for R split rows of x.
template <int R>
PK_INLINE void add_code_dots(const Codes& c, Stretch s, FewRows x, Vec* totals) {
  const int64_t d = c.cols;
  const uint8_t* from = c.data + s.line * d / 2;
  const Book book(c.book);
  auto [block, left] = in_block(c, s.line * d + s.start);
  Vec sums[R][CHAINS<R>]{};
  for (int64_t p = s.start, end; p < s.end; p = end, left = c.block) {
    end = std::min(s.end, p + left);
    const Book scaled = book.times(block_scale(c, block++));
    for (int64_t q = p; q < end; q += CHUNK) {
      const WordVec codes = bytes(from + q / 2);
      const Vec even = scaled.at(codes >> 4), odd = scaled.at(codes);
      for (int i = 0; i < R; i++) {
        sums[i][0] += load(x.data + i * x.row + q) * even;
        sums[i][CHAINS<R> - 1] += load(x.data + i * x.row + q + V) * odd;
      }
    }
    if (end % SPLIT_RUN == 0 || end == s.end) end_chains<R>(sums, totals);
  }
}

// How many lines of the weight are read at once: books and values fill the registers.
constexpr int64_t LINES = V == 16 ? 4 : 2;

// sums[i] += sum over N lines of x[i][n] line[n], for m rows of split sums and the columns
// [col, col + count) of lines that follow one another.
template <int N>
PK_INLINE void add_code_lines(const Codes& c, int64_t line, int64_t col, int64_t count, int64_t m,
                              const float* x, int64_t x_row, float* sums, int64_t sums_row) {
  const Book book(c.book);
  const uint8_t* from = c.data + (line * c.cols + col) / 2;
  int64_t blocks[N];
  for (int n = 0; n < N; n++) blocks[n] = in_block(c, (line + n) * c.cols + col).block;
  // Alike in all: a line has whole blocks, or a block whole lines.
  int64_t left = in_block(c, line * c.cols + col).left;
  for (int64_t j = 0; j < count; left = c.block) {
    const int64_t end = std::min(count, j + left);
    Book scaled[N];
    for (int n = 0; n < N; n++) scaled[n] = book.times(block_scale(c, blocks[n]++));
    for (; j < end; j += CHUNK) {
      Vec even[N], odd[N];
      for (int n = 0; n < N; n++) {
        const WordVec codes = bytes(from + (n * c.cols + j) / 2);
        even[n] = scaled[n].at(codes >> 4), odd[n] = scaled[n].at(codes);
      }
      for (int64_t i = 0; i < m; i++) {
        float* to = sums + i * sums_row + j;
        Vec first = load(to), second = load(to + V);
        for (int n = 0; n < N; n++) {
          const Vec factor = splat(x[i * x_row + n]);
          first += factor * even[n], second += factor * odd[n];
        }
        store(to, first), store(to + V, second);
      }
    }
  }
}
#endif

// Whether the lines of such a weight are read where they lie, by a few rows.
inline bool is_read_in_place(const Codes& c) { return is_split_easily(c) || is_read_in_order(c); }

// totals[i] += x[i] . stretch, for R rows of x: split where codes are nibbles.
template <int R>
PK_INLINE void add_stretch_dots(const Codes& c, Stretch s, FewRows x, Vec* totals) {
#if defined(__AVX2__)
  if (c.layout == Layout::nibbles) return add_code_dots<R>(c, s, x, totals);
#endif
  add_ordered_dots<R>(c, s, x, totals);
}

}  // namespace peft_kernels::PK_ISA
