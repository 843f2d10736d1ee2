// Attention of a few queries, such as a decode step's: keys and values are read once, where they
// lie, for packing them would take longer than the products do.
#pragma once
#include "prefix_attention_rows.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t KEYS_IN_L1 = 32;
constexpr int COLUMN_VECS = 8;
constexpr int64_t PREFETCHED = 32;  // keys ahead, in a run from memory

// The sums of B vectors.
PK_INLINE Block sums_of(const Vec (&v)[B]) {
  Block halves[B];
  for (int i = 0; i < B; i++) {
    Block parts[V / B];
    std::memcpy(parts, &v[i], sizeof parts);
    halves[i] = parts[0];
    for (int p = 1; p < V / B; p++) halves[i] += parts[p];
  }
  transpose(halves);
  for (int step = 1; step < B; step *= 2)
    for (int i = 0; i < B; i += 2 * step) halves[i] += halves[i + step];
  return halves[0];
}

template <class T>
PK_INLINE Vec load_tail(const T* from, int64_t n) {
  Vec v{};
  for (int64_t i = 0; i < n; i++) v[i] = widen(from[i]);
  return v;
}

// scores[j] = q . keys_j for N keys, N up to B; q has zeros up to the end of a vector. Key after
// key, so that memory is read in its order.
template <int N, class T>
PK_INLINE void dot(const float* q, const T* keys, int64_t token, int64_t dim, float* scores) {
  Vec sums[B]{};
  for (int j = 0; j < N; j++) {
    const T* key = keys + j * token;
    Vec sum{};
    int64_t d = 0;
    for (; d + V <= dim; d += V) {
      sum += load(q + d) * load(key + d);
      __builtin_prefetch(key + PREFETCHED * token + d);
    }
    if (d < dim) sum += load(q + d) * load_tail(key + d, dim - d);
    sums[j] = sum;
  }
  const Block block = sums_of(sums);
  std::memcpy(scores, &block, N * sizeof(float));
}

template <class T>
void dot_keys(const float* q, int64_t q_row, int64_t n, const T* keys, int64_t token, int64_t count,
              int64_t dim, float* scores, int64_t scores_row) {
  int64_t j = 0;
  for (; j + B <= count; j += B)
    for (int64_t i = 0; i < n; i++)
      dot<B>(q + i * q_row, keys + j * token, token, dim, scores + i * scores_row + j);
  for (; j < count; j++)
    for (int64_t i = 0; i < n; i++)
      dot<1>(q + i * q_row, keys + j * token, token, dim, scores + i * scores_row + j);
}

// out[N vectors] += sum over j of weights[j] values_j
template <int N, class T>
PK_INLINE void add_weighted(const float* weights, const T* values, int64_t token, int64_t count,
                            float* out) {
  Vec sums[N];
  for (int v = 0; v < N; v++) sums[v] = Vec{};
  for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) {
      sums[v] += weights[j] * load(values + j * token + v * V);
      if (N > 1) __builtin_prefetch(values + (j + PREFETCHED) * token + v * V);
    }
  for (int v = 0; v < N; v++) store(out + v * V, load(out + v * V) + sums[v]);
}

template <class T>
void add_weighted_values(const float* weights, int64_t weights_row, int64_t n, const T* values,
                         int64_t token, int64_t count, int64_t dim, float* out, int64_t out_row) {
  for (int64_t j = 0; j < count; j += KEYS_IN_L1)
    for (int64_t i = 0; i < n; i++) {
      const int64_t keys = std::min(KEYS_IN_L1, count - j);
      const float* w = weights + i * weights_row + j;
      const T* from = values + j * token;
      float* to = out + i * out_row;
      int64_t d = 0;
      for (; d + COLUMN_VECS * V <= dim; d += COLUMN_VECS * V)
        add_weighted<COLUMN_VECS>(w, from + d, token, keys, to + d);
      for (; d + V <= dim; d += V) add_weighted<1>(w, from + d, token, keys, to + d);
      for (; d < dim; d++) {
        float sum = 0;
        for (int64_t e = 0; e < keys; e++) sum += w[e] * widen(from[e * token + d]);
        to[d] += sum;
      }
    }
}

// One block of keys [key, key + width), all of the prefix or all of the text.
inline void attend_directly(const QueryBlock& block, const Heads& keys, const Heads& values,
                            int64_t row, int64_t token, int64_t key, int64_t width, const float* q,
                            int64_t q_row, OnlineSoftmax& softmax, float* scores, float* sums,
                            float* out) {
  const Unit& unit = block.unit;
  const int64_t dim = unit.in.dim;
  with_type(keys.dtype, keys.at(row, unit.head, token), [&](auto* data) {
    dot_keys(q, q_row, block.n, data, keys.token, width, dim, scores, KEYS);
  });
  for (int64_t i = 0; i < block.n; i++) {
    const int64_t n = std::clamp<int64_t>(block.limits[i] - key, 0, width);
    if (unit.in.mask) unit.add_mask(block.first + i, key, n, scores + i * KEYS);
    softmax.add(i, scores + i * KEYS, n);
    std::fill(scores + i * KEYS + n, scores + i * KEYS + width, 0.0f);
  }
  std::memset(sums, 0, block.n * q_row * sizeof(float));
  with_type(values.dtype, values.at(row, unit.head, token), [&](auto* data) {
    add_weighted_values(scores, KEYS, block.n, data, values.token, width, dim, sums, q_row);
  });
  for (int64_t i = 0; i < block.n; i++)
    for (int64_t d = i * q_row; d < i * q_row + dim; d++)
      out[d] = out[d] * softmax.factor[i] + sums[d];
}

// out [n, q_row] of a block of queries q [n, q_row], out being 0; sums [n, q_row] is scratch.
inline void attend_directly(const QueryBlock& block, int64_t prefix, const float* q, int64_t q_row,
                            OnlineSoftmax& softmax, float* scores, float* sums, float* out) {
  const Unit& unit = block.unit;
  const PrefixAttentionInputs& in = unit.in;
  for (int64_t key = 0; key < unit.length; key += KEYS)
    attend_directly(block, in.prefix_k, in.prefix_v, prefix, key, key,
                    std::min(KEYS, unit.length - key), q, q_row, softmax, scores, sums, out);
  for (int64_t key = unit.length; key < block.keys(); key += KEYS)
    attend_directly(block, in.k, in.v, unit.row, unit.start + key - unit.length, key,
                    std::min(KEYS, block.keys() - key), q, q_row, softmax, scores, sums, out);
}

}  // namespace peft_kernels::PK_ISA
