// The steps of multi-LoRA linear on the CPU, one build of each per instruction set.
#pragma once
#include "matrix/matrix.h"

namespace peft_kernels {

constexpr int64_t PAGE = 8;        // rank rows
constexpr int64_t SHRINK_ROWS = 12;  // of a unit, at most: they stay in L1 beside A's
constexpr int64_t EXPAND_ROWS = 48;  // of a unit, at most: B's columns stay in L2 beside them

// One side of a bank's adapters: A [rows, k], or B [rows, n], in pages of rank rows.
struct Pages {
  Matrix data;                // where adapters lie apart: the shape of any, without its rows
  const int32_t* table;       // [slots, max_pages]
  int64_t max_pages;
  const void* const* apart;   // [slots]: each adapter's rows on end; null where data has them all
  bool across = false;        // each adapter is [n, rank] instead: of apart alone, in expand_region

  PK_INLINE int64_t row(int64_t slot, int64_t page) const {
    return int64_t(table[slot * max_pages + page]) * PAGE;
  }
  template <class T>
  PK_INLINE const T* first(int64_t slot, int64_t page) const {
    if (apart) return static_cast<const T*>(apart[slot]) + page * PAGE * data.row_stride;
    return static_cast<const T*>(data.data) + row(slot, page) * data.row_stride;
  }
};

// An adapter that has rows, and what is its own.
struct Group {
  int64_t slot, rank;
  int64_t begin, end;  // its rows are rows[begin, end), in the batch's order
  float scale;
  Dropout dropout;     // threshold 0 for none; a row's counter is its place among the group's rows
};

// A piece of work: rows of one group, by pages or by columns.
struct Unit {
  int64_t group, begin, end;  // rows[begin, end)
  int64_t part_begin, part_end;
};

struct Work {
  const int64_t* rows;
  const Group* groups;
  int64_t group_count;
  const Unit* units;
  int64_t unit_count;
};

struct FloatRows {
  float* data;
  int64_t stride;
};

// s[i, q] = factor_g * sum_p mask_g(i, p) * x[i, p] A_g[q, p], for the units' pages. The factor is
// the adapter's scale, or 1. In pairs, x and the pages are bfloat16 and the processor multiplies
// those.
struct Shrink {
  Work work;
  Matrix x;  // rows contiguous
  Pages pages;
  bool scaled, masked, in_pairs;
  FloatRows s;
};

// y[i, column + j] += mask_g(i, j) * factor_g * sum_q s[i, q] B_g[q, j].
struct Expand {
  Work work;
  FloatRows s;
  Pages pages;
  bool scaled, masked;
  Matrix y;           // rows contiguous
  int64_t column;     // where the pages' columns begin in y
  int64_t first_row;  // the row that y begins with
};

// out[first + q, j] = factor_g * sum_i s[i, q] x[i, j], for the units' columns and all their rows,
// with first = out_rows[slot].
struct Outer {
  Work work;
  FloatRows s;
  Matrix x;  // rows contiguous
  bool scaled, masked;
  const int32_t* out_rows;
  Matrix out;
};

// out[m, c] = x g + bias, then each expand, whose y is out. Each row's sums go in one order,
// whatever m is.
struct Base {
  Matrix x, g;
  const Matrix* bias;
  Matrix out;
  const Expand* expands;
  int64_t expand_count;
};

struct MultiLoRALinearKernels {
  void (*base)(const Base&, const Parallel&);
  void (*shrink)(const Shrink* banks, int64_t count, const Parallel&);
  void (*expand)(const Expand* banks, int64_t count, const Parallel&);  // by units
  void (*update)(const Shrink*, const Expand*, int64_t count, const Parallel&);  // in this order
  void (*outer)(const Outer&, const Parallel&);
  void (*narrow)(FloatRows from, const Matrix& to, const Parallel&);  // rounds once
};

extern const MultiLoRALinearKernels multi_lora_linear_baseline;
extern const MultiLoRALinearKernels multi_lora_linear_avx2;
extern const MultiLoRALinearKernels multi_lora_linear_avx512;

}  // namespace peft_kernels
