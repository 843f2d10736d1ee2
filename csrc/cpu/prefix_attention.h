// Attention with a prefix on the CPU, one build of its kernels per instruction set.
#pragma once
#include "matrix/matrix.h"

namespace peft_kernels {

// [B, H, N, D] anywhere in memory, with D contiguous; strides count elements.
struct Heads {
  void* data;
  DType dtype;
  int64_t row, head, token;

  PK_INLINE char* at(int64_t r, int64_t h, int64_t t) const {
    return static_cast<char*>(data) + (r * row + h * head + t * token) * size_of(dtype);
  }
};

// [B, Hq, S, T], any strides: true where a query may attend, or what is added to its scores.
struct AttentionMask {
  enum class Kind { boolean, f32, f16, bf16 };
  const void* data;
  Kind kind;
  int64_t row, head, query, key;
};

// Rows order[begin, end) of the batch, which use one prefix (-1: none).
struct Segment {
  int64_t prefix, begin, end;
};

struct PrefixAttentionInputs {
  int64_t rows, heads, kv_heads, queries, keys, dim, length, prefixes;
  Heads q, k, v, prefix_k, prefix_v;  // the prefixes are [P, Hkv, L, D]
  const AttentionMask* mask;          // null for none
  const int32_t *starts, *ends;       // the real keys of a row's text; null for all
  bool is_causal;
  double scale;
  const int64_t* order;
  const Segment* segments;  // by prefix
  int64_t segment_count;
};

struct PrefixAttentionForward {
  PrefixAttentionInputs in;
  Heads out;
  float* lse;  // [B, Hq, S]
};

// The last line's are outputs, and null where they aren't wanted.
struct PrefixAttentionBackward {
  PrefixAttentionInputs in;
  Heads dout, out;
  const float* lse;
  const Heads *dq, *dk, *dv;
  float *d_prefix_k, *d_prefix_v;  // [P, Hkv, L, D]
};

struct PrefixAttentionKernels {
  void (*forward)(const PrefixAttentionForward&, const Parallel&);
  void (*backward)(const PrefixAttentionBackward&, const Parallel&);
};

extern const PrefixAttentionKernels prefix_attention_baseline;
extern const PrefixAttentionKernels prefix_attention_avx2;
extern const PrefixAttentionKernels prefix_attention_avx512;

}  // namespace peft_kernels
