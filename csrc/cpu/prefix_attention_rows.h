// The queries of one row and kv head, block by block: which keys each may see, their softmax, and
// what of a mask is theirs.
//
// Keys are counted from the first of the prefix on; after its last comes the row's first real key.
// Query i of a unit is token i / group of head head * group + i % group, so that a later one sees
// no less than an earlier. Scores are kept times log2(e), for 2^x takes less than e^x.
#pragma once
#include <cmath>

#include "activations.h"
#include "prefix_attention.h"
#include "matrix/tile.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t QUERIES = 48, KEYS = 128;  // a block of scores: multiples of ROWS and of LANES
constexpr double LOG2_E = 1.44269504088896341, LN_2 = 0.69314718055994531;
constexpr float INFINITE = __builtin_inff();

// 2^(x - whole), within 2 units in the last place; 0 below the normal numbers. Up to 2^127, and for
// x up to 2^22. What is large on both sides goes into whole, as a difference of floats is rounded.
PK_INLINE Vec exp2(Vec x, int32_t whole = 0) {
  constexpr float ROUND = 12582912.0f, LOW = -126.0f;  // 1.5 * 2^23
  constexpr float TERMS[] = {1.534581242594868e-4f,  1.3399930903688073e-3f, 9.618489071726799e-3f,
                             5.550328642129898e-2f,  2.4022646248340607e-1f, 6.931471824645996e-1f,
                             1.0f};
  const Vec rounded = x + ROUND;
  const Vec power = polynomial(x - (rounded - ROUND), TERMS);
  // Unsigned, as what is far below LOW overflows before it is thrown away.
  const Vec result = (Vec)((UintVec)power + (((UintVec)rounded - uint32_t(whole)) << 23));
  return x < LOW + float(whole) ? Vec{} : result;
}

PK_INLINE float largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < V; i++) most = v[i] > most ? v[i] : most;
  return most;
}

struct Unit {
  const PrefixAttentionInputs& in;
  int64_t row, head;  // of the batch, of the kv heads
  int64_t length;     // of the prefix; 0 for none
  int64_t start = 0, count = 0;  // of the row's real keys
  int64_t group = in.heads / in.kv_heads, queries = in.queries * group;

  Unit(const PrefixAttentionInputs& inputs, int64_t row, int64_t head, bool has_prefix)
      : in(inputs), row(row), head(head), length(has_prefix ? inputs.length : 0) {
    start = in.starts ? std::clamp<int64_t>(in.starts[row], 0, in.keys) : 0;
    const int64_t end = in.ends ? std::clamp<int64_t>(in.ends[row], start, in.keys) : in.keys;
    count = end - start;
  }

  int64_t query_head(int64_t i) const { return head * group + i % group; }
  int64_t token(int64_t i) const { return i / group; }
  int64_t keys() const { return length + count; }

  // How many keys query i may see: the first so many.
  int64_t limit(int64_t i) const {
    const int64_t last = in.keys - in.queries + token(i) + 1 - start;
    return length + (in.is_causal ? std::clamp<int64_t>(last, 0, count) : count);
  }

  // Queries [first, first + n) of a tensor as floats times factor, each dim of them and zeros. A
  // factor rounded to float would be off by as much in every term of a score.
  void copy_queries(const Heads& from, int64_t first, int64_t n, double factor, float* to,
                    int64_t to_row) const {
    for (int64_t i = first; i < first + n; i++, to += to_row) {
      with_type(from.dtype, from.at(row, query_head(i), token(i)),
                [&](auto* values) { widen_row(values, to, in.dim); });
      for (int64_t d = 0; d < in.dim; d++) to[d] = float(to[d] * factor);
      for (int64_t d = in.dim; d < to_row; d++) to[d] = 0;
    }
  }

  void store_query(const Heads& out, int64_t i, const float* values) const {
    with_type(out.dtype, out.at(row, query_head(i), token(i)),
              [&](auto* to) { narrow_row(values, to, in.dim); });
  }

  // scores[j] += the mask of query i and key first + j, where that is of the text.
  void add_mask(int64_t i, int64_t first, int64_t n, float* scores) const;
};

// The lowest finite float, as masks have it, stays finite times log2(e) and beside a score.
constexpr float LOWEST = -2.0e38f;

template <class T>
PK_INLINE void add_floats(const T* mask, int64_t stride, int64_t n, float* scores) {
  for (int64_t j = 0; j < n; j++) {
    const float value = widen(mask[j * stride]);
    const float bounded = value < LOWEST && value != -INFINITE ? LOWEST : value;
    scores[j] += bounded * float(LOG2_E);
  }
}

inline void Unit::add_mask(int64_t i, int64_t first, int64_t n, float* scores) const {
  using Kind = AttentionMask::Kind;
  const AttentionMask& mask = *in.mask;
  const int64_t skipped = std::clamp<int64_t>(length - first, 0, n);  // the prefix has no mask
  const int64_t at = row * mask.row + query_head(i) * mask.head + token(i) * mask.query +
                     (start + first + skipped - length) * mask.key;
  scores += skipped, n -= skipped;
  switch (mask.kind) {
    case Kind::f32: return add_floats(static_cast<const Float*>(mask.data) + at, mask.key, n, scores);
    case Kind::f16: return add_floats(static_cast<const Half*>(mask.data) + at, mask.key, n, scores);
    case Kind::bf16:
      return add_floats(static_cast<const BFloat16*>(mask.data) + at, mask.key, n, scores);
    case Kind::boolean: {
      const uint8_t* seen = static_cast<const uint8_t*>(mask.data) + at;
      for (int64_t j = 0; j < n; j++) scores[j] = seen[j * mask.key] ? scores[j] : -INFINITE;
    }
  }
}

// The queries of a block, and how many of all keys each may see.
struct QueryBlock {
  const Unit& unit;
  int64_t first, n;
  int64_t limits[QUERIES];

  QueryBlock(const Unit& unit, int64_t first) : unit(unit), first(first) {
    n = std::min(QUERIES, unit.queries - first);
    for (int64_t i = 0; i < n; i++) limits[i] = unit.limit(first + i);
  }

  int64_t keys() const { return limits[n - 1]; }
  int64_t last_of_tile(int64_t i) const { return std::min(i + ROWS, n) - 1; }

  // The first query, a multiple of unit, of which one in its tile sees the key.
  int64_t first_tile_that_sees(int64_t key) const {
    int64_t i = 0;
    while (i < n && limits[last_of_tile(i)] <= key) i += ROWS;
    return i;
  }
};

// Sets what follows n scores to v up to the end of a vector, so that rows go by whole vectors.
PK_INLINE int64_t pad_vector(float* scores, int64_t n, float v) {
  const int64_t whole = round_up(n, V);
  for (; n < whole; n++) scores[n] = v;
  return whole;
}

// The softmax of a block's queries over the keys so far: their largest score, and the sum of
// 2^(score - largest).
struct OnlineSoftmax {
  float largest_score[QUERIES];
  double total[QUERIES];  // of one term a block of keys: in float these would be one long run
  float factor[QUERIES];  // of what was summed up before the last block of keys

  OnlineSoftmax() {
    std::fill_n(largest_score, QUERIES, -INFINITE);
    std::fill_n(total, QUERIES, 0.0);
  }

  // scores[n] -> 2^(scores - largest), and 0 up to the end of a vector.
  void add(int64_t i, float* scores, int64_t n) {
    const int64_t whole = pad_vector(scores, n, -INFINITE);
    Vec most = splat(largest_score[i]);
    for (int64_t j = 0; j < whole; j += V) {
      const Vec s = load(scores + j);
      most = most < s ? s : most;
    }
    const float before = largest_score[i], now = largest(most);
    const float base = now == -INFINITE ? 0.0f : now;
    Vec sums{};
    for (int64_t j = 0; j < whole; j += V) {
      const Vec p = exp2(load(scores + j) - base);
      store(scores + j, p);
      sums += p;
    }
    factor[i] = exp2(splat(before - base))[0];
    largest_score[i] = now;
    total[i] = total[i] * factor[i] + sum(sums);
  }

  float log_sum(int64_t i) const {
    return total[i] == 0 ? -INFINITE : float((largest_score[i] + std::log2(total[i])) * LN_2);
  }
};

}  // namespace peft_kernels::PK_ISA
