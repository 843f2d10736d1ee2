// Plain views that cross from the torch side into the kernels; nothing here depends on torch.
#pragma once
#include <cstdint>

namespace peft_kernels {

enum class DType : int { f32, f16, bf16 };

// Always inlined, as builds for several instruction sets share this file.
#define PK_INLINE inline __attribute__((always_inline))

PK_INLINE int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A [rows, cols] matrix anywhere in memory; strides count elements, and one of them is 1.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, cols, row_stride, col_stride;

  PK_INLINE char* at(int64_t row, int64_t col) const {
    return static_cast<char*>(data) + (row * row_stride + col * col_stride) * size_of(dtype);
  }
  PK_INLINE Matrix transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
};

// Where codes and what they are scaled by lie: apart, or in blocks of GGUF's.
enum class Layout { nibbles, bytes, e4m3, q8_0, q4_0, q4_1, q4_K, q6_K };

// A weight in codes, of so many columns. Apart, element (i, j) is value(code) scale + shift, with
// the scale and the shift of its block: e / block for element e counted row by row, or where blocks
// have several rows the one that holds row i and column j.
struct Codes {
  Layout layout;
  const uint8_t* data;  // nibbles: two codes a byte, the first in the high half
  int64_t cols;
  const float* book;  // [16], the values of nibbles
  int64_t block, block_rows;
  const void *scales, *shifts;  // of scale_type; shifts null for 0. Scales are times unit; or,
  DType scale_type;
  float unit;
  const uint8_t* scale_codes;  // in codes themselves,
  const float *nested_scales, *nested_book;  // null without; [256]
  int64_t nested_block;
  float offset;
  int block_bits = -1, nested_bits = -1;  // of block and nested_block where those are powers of 2
};

// Element (i, j) is dropped when word j % 4 of philox(seed, j / 4, i, 0, 0) is below threshold.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float keep_scale;  // 1 / (1 - p)
};

// Runs task(ctx, 0) ... task(ctx, tasks - 1) on torch's threads and waits for them.
struct Parallel {
  int threads;
  void (*run)(int64_t tasks, void (*task)(void* ctx, int64_t index), void* ctx);

  template <class F>
  void operator()(int64_t tasks, const F& f) const {
    run(tasks, [](void* ctx, int64_t index) { (*static_cast<const F*>(ctx))(index); }, (void*)&f);
  }
};

}  // namespace peft_kernels
