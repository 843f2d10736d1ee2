// Soft prompts among text, device code: memory moves, a warp a chunk of one token's elements.
//
// Forward, one launch: the first blocks take a row's mask, positions and labels each; the warps of
// the others find out what a place of the output holds and copy a chunk of it. Backward, one
// launch: the first warps add up the rows of a prompt's chunk, in the batch's order; the others
// copy the text's gradient. Whatever the ids and the positions are, nothing is read or written out
// of bounds.
#pragma once
#include <type_traits>

#include "device.cuh"

namespace peft_kernels::cuda {

constexpr int LOOKUP_THREADS = 256, LOOKUP_WARPS = LOOKUP_THREADS / 32;
constexpr int AT_ONCE = 4;         // vectors that a lane has on their way
constexpr int64_t IGNORED = -100;  // the label that losses leave out

// Where the soft tokens stand: strictly increasing places of each row, among length + seq.
struct PromptPlaces {
  const int32_t* positions;
  int64_t row_stride, slot_stride;
  int batch, length, seq;

  __host__ __device__ int64_t total() const { return int64_t(length) + seq; }
};

// Vectors [b, token] of contiguous elements.
template <class T>
struct Tokens {
  T* data;
  int64_t row_stride, token_stride;

  PK_DEVICE T* at(int64_t b, int64_t token) const {
    return data + b * row_stride + token * token_stride;
  }
  // Every token begins with a whole vector of 16 bytes.
  bool aligned() const {
    const int64_t strides = (row_stride | token_stride) * int64_t(sizeof(T));
    return strides % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
};

// [batch, seq], or null.
struct Integers {
  const int64_t* data;
  int64_t row_stride, token_stride;

  PK_DEVICE int64_t at(int64_t b, int64_t s) const {
    return load(data + b * row_stride + s * token_stride);
  }
};

template <class T, class A>
struct PromptForward {
  PromptPlaces places;
  int d, prompts;
  Tokens<const T> embeddings;
  Tokens<const A> table;    // [prompts, length]
  const int32_t* task_ids;  // [batch], or null: all 0; outside of [0, prompts): no prompt
  Integers mask, labels;
  Tokens<T> out;
  int64_t *out_mask, *position_ids, *out_labels;  // [batch, total]; labels null without
};

template <class T>
struct PromptBackward {
  PromptPlaces places;
  int d, prompts;
  Tokens<const T> d_out;
  const int32_t* task_ids;
  Tokens<T> d_embeddings;  // its data null where it isn't wanted
  float* d_prompts;        // [prompts, length, d], null where it isn't wanted
};

// ---- places ----------------------------------------------------------------------------------

PK_DEVICE int64_t place_of(const PromptPlaces& p, int64_t b, int64_t slot) {
  return load(p.positions + b * p.row_stride + slot * p.slot_stride);
}

// How many slots of row b stand before the text's token `at` (text) or the place `at` (otherwise).
PK_DEVICE int slots_before(const PromptPlaces& p, int64_t b, int64_t at, bool text) {
  if (p.length == 0) return 0;
  const int64_t first = place_of(p, b, 0);
  if (place_of(p, b, p.length - 1) - first == p.length - 1) {  // they follow each other
    const int64_t behind = at - first;
    if (text) return behind < 0 ? 0 : p.length;
    return int(least<int64_t>(behind < 0 ? 0 : behind, p.length));
  }
  int low = 0, high = p.length;
  while (low < high) {
    const int middle = (low + high) / 2;
    const int64_t place = place_of(p, b, middle);
    if (text ? place - middle <= at : place < at) low = middle + 1;
    else high = middle;
  }
  return low;
}

struct Source {
  int slot, token;  // -1 but for one of them; both: nothing
};

PK_DEVICE Source source_of(const PromptPlaces& p, int64_t b, int64_t place) {
  const int before = slots_before(p, b, place, false);
  if (before < p.length && place_of(p, b, before) == place) return {before, -1};
  const int64_t token = place - before;
  return {-1, token >= 0 && token < p.seq ? int(token) : -1};
}

// -1 for a row without a prompt.
template <class P>
PK_DEVICE int task_of(const P& p, int64_t b) {
  const int task = p.task_ids ? load(p.task_ids + b) : 0;
  return task >= 0 && task < p.prompts ? task : -1;
}

// ---- chunks ----------------------------------------------------------------------------------

__host__ __device__ constexpr int64_t chunks_of(int64_t d, int64_t elements) {
  return (d + elements - 1) / elements;
}

// N elements as they move: whole vectors of 16 bytes as words, which no compiler takes apart.
template <int N, class T>
using Moved = std::conditional_t<N * sizeof(T) == 16, Pack<uint32_t, 4>, Pack<T, N>>;

// Vectors of N elements from memory that holds them in another dtype, 16 bytes at a time.
template <int N, class T, class A>
PK_DEVICE Pack<T, N> load_as(const A* from) {
  constexpr int PART = least(N, 4);
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; i += PART) {
    const auto part = load(reinterpret_cast<const Pack<A, PART>*>(from + i));
#pragma unroll
    for (int j = 0; j < PART; j++) from_float(to_float(part.v[j]), pack.v[i + j]);
  }
  return pack;
}

// Elements [begin, begin + AT_ONCE * 32 * N) of d, by one warp; zeros from null.
template <int N, class T, class A>
PK_DEVICE void copy_chunk(T* to, const A* from, int64_t begin, int d) {
  constexpr bool SAME = std::is_same_v<T, A>;
  using Vector = std::conditional_t<SAME, Moved<N, T>, Pack<T, N>>;
  const int64_t first = begin + threadIdx.x % 32 * N;
  Vector vectors[AT_ONCE] = {};
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) {
    const int64_t at = first + i * 32 * N;
    if (!from || at >= d) continue;
    if constexpr (SAME) vectors[i] = load(reinterpret_cast<const Vector*>(from + at));
    else vectors[i] = load_as<N, T>(from + at);
  }
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) {
    const int64_t at = first + i * 32 * N;
    if (at < d) store(reinterpret_cast<Vector*>(to + at), vectors[i]);
  }
}

// ---- masks, positions and labels -------------------------------------------------------------

template <class P>
PK_DEVICE bool is_real(const P& p, int64_t b, Source source) {
  if (source.slot >= 0) return task_of(p, b) >= 0;
  return source.token >= 0 && (!p.mask.data || p.mask.at(b, source.token) != 0);
}

PK_DEVICE int sum_up_to_lane(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_sync(0xffffffff, value, lane < lanes ? lane : lane - lanes);
    if (lane >= lanes) value += other;
  }
  return value;
}

// Row b, by one block: its warps count the real tokens of a part each, then number them.
template <class P>
PK_DEVICE void fill_row(const P& p, int64_t b) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t total = p.places.total();
  const int64_t part = chunks_of(total, LOOKUP_THREADS) * 32;
  const int64_t begin = least(warp * part, total), end = least(begin + part, total);
  int real = 0;
  for (int64_t j = begin + lane; j < end; j += 32)
    real += is_real(p, b, source_of(p.places, b, j));
  int* counts = reinterpret_cast<int*>(shared_memory());
  const int whole = __shfl_sync(0xffffffff, sum_up_to_lane(real), 31);
  if (lane == 0) counts[warp] = whole;
  __syncthreads();
  int before = 0;
  for (int other = 0; other < warp; other++) before += counts[other];
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t j = first + lane, at = b * total + j;
    const Source source = j < end ? source_of(p.places, b, j) : Source{-1, -1};
    const bool own = is_real(p, b, source);
    const int upto = before + sum_up_to_lane(own);
    before = __shfl_sync(0xffffffff, upto, 31);
    if (j >= end) continue;
    store(p.out_mask + at, int64_t(own));
    store(p.position_ids + at, int64_t(upto > 0 ? upto - 1 : 0));
    if (p.out_labels)
      store(p.out_labels + at, source.token >= 0 ? p.labels.at(b, source.token) : IGNORED);
  }
}

// ---- forward ---------------------------------------------------------------------------------

template <int N, class T, class A>
__global__ void __launch_bounds__(LOOKUP_THREADS)
    prompt_lookup_fwd(const __grid_constant__ PromptForward<T, A> p) {
  if (blockIdx.x < unsigned(p.places.batch)) return fill_row(p, blockIdx.x);
  constexpr int64_t CHUNK = AT_ONCE * 32 * N;
  const int64_t block = blockIdx.x - unsigned(p.places.batch);
  const int64_t chunks = chunks_of(p.d, CHUNK), total = p.places.total();
  const int64_t unit = block * LOOKUP_WARPS + threadIdx.x / 32;
  const int64_t token = unit / chunks, b = token / total, j = token % total;
  if (b >= p.places.batch) return;
  const int64_t begin = unit % chunks * CHUNK;
  T* to = p.out.at(b, j);
  const Source source = source_of(p.places, b, j);
  const int task = source.slot < 0 ? -1 : task_of(p, b);
  const A* soft = task < 0 ? nullptr : p.table.at(task, source.slot);
  const T* text = source.token < 0 ? nullptr : p.embeddings.at(b, source.token);
  if constexpr (std::is_same_v<T, A>) copy_chunk<N>(to, soft ? soft : text, begin, p.d);
  else soft ? copy_chunk<N>(to, soft, begin, p.d) : copy_chunk<N>(to, text, begin, p.d);
}

// ---- backward --------------------------------------------------------------------------------

// Elements [begin, begin + 32 * N) of a soft token's gradient.
template <int N, class T>
PK_DEVICE void sum_chunk(const PromptBackward<T>& p, int task, int slot, int64_t begin) {
  const int64_t at = begin + threadIdx.x % 32 * N;
  if (at >= p.d) return;
  float sums[N] = {};
  for (int64_t first = 0; first < p.places.batch; first += AT_ONCE) {
    Pack<T, N> packs[AT_ONCE];
    bool own[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int64_t b = first + i;
      own[i] = b < p.places.batch && task_of(p, b) == task;
      const int64_t place = own[i] ? place_of(p.places, b, slot) : 0;
      own[i] = own[i] && place >= 0 && place < p.places.total();
      if (own[i]) packs[i] = load(reinterpret_cast<const Pack<T, N>*>(p.d_out.at(b, place) + at));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (!own[i]) continue;
#pragma unroll
      for (int j = 0; j < N; j++) sums[j] += to_float(packs[i].v[j]);
    }
  }
  constexpr int PART = least(N, 4);
  float* to = p.d_prompts + (int64_t(task) * p.places.length + slot) * p.d + at;
#pragma unroll
  for (int i = 0; i < N; i += PART) {
    Pack<float, PART> part;
#pragma unroll
    for (int j = 0; j < PART; j++) part.v[j] = sums[i + j];
    store(reinterpret_cast<Pack<float, PART>*>(to + i), part);
  }
}

template <int N, class T>
__host__ __device__ int64_t sum_units(const PromptBackward<T>& p) {
  return p.d_prompts ? int64_t(p.prompts) * p.places.length * chunks_of(p.d, 32 * N) : 0;
}

template <int N, class T>
__global__ void __launch_bounds__(LOOKUP_THREADS)
    prompt_lookup_bwd(const __grid_constant__ PromptBackward<T> p) {
  int64_t unit = int64_t(blockIdx.x) * LOOKUP_WARPS + threadIdx.x / 32;
  if (const int64_t sums = sum_units<N>(p); unit < sums) {
    const int64_t chunks = chunks_of(p.d, 32 * N), token = unit / chunks;
    const int64_t length = p.places.length;
    return sum_chunk<N>(p, int(token / length), int(token % length), unit % chunks * 32 * N);
  } else {
    unit -= sums;
  }
  constexpr int64_t CHUNK = AT_ONCE * 32 * N;
  const int64_t chunks = chunks_of(p.d, CHUNK), token = unit / chunks;
  if (!p.d_embeddings.data || token >= int64_t(p.places.batch) * p.places.seq) return;
  const int64_t b = token / p.places.seq, s = token % p.places.seq;
  const int64_t place = s + slots_before(p.places, b, s, true);
  copy_chunk<N>(p.d_embeddings.at(b, s), p.d_out.at(b, place), unit % chunks * CHUNK, p.d);
}

// ---- launches --------------------------------------------------------------------------------

// Calls launch(kernel, blocks, bytes of shared memory): with whole vectors of 16 bytes where every
// token begins and ends with one.
template <class T, class A, class F>
void with_forward(const PromptForward<T, A>& p, const F& launch) {
  const auto blocks = [&](int64_t n) {
    const int64_t units = p.places.batch * p.places.total() * chunks_of(p.d, AT_ONCE * 32 * n);
    return p.places.batch + chunks_of(units, LOOKUP_WARPS);
  };
  constexpr int N = 16 / sizeof(T);
  constexpr int64_t SHARED = LOOKUP_WARPS * sizeof(int);
  const bool whole = p.embeddings.aligned() && p.table.aligned() && p.out.aligned();
  if (whole && p.d % N == 0) launch(prompt_lookup_fwd<N, T, A>, blocks(N), SHARED);
  else launch(prompt_lookup_fwd<1, T, A>, blocks(1), SHARED);
}

template <class T, class F>
void with_backward(const PromptBackward<T>& p, const F& launch) {
  const auto blocks = [&](int64_t n, int64_t sums) {
    const int64_t tokens = p.d_embeddings.data ? int64_t(p.places.batch) * p.places.seq : 0;
    return chunks_of(sums + tokens * chunks_of(p.d, AT_ONCE * 32 * n), LOOKUP_WARPS);
  };
  constexpr int N = 16 / sizeof(T);
  const bool whole = p.d_out.aligned() && p.d_embeddings.aligned();
  if (whole && p.d % N == 0) launch(prompt_lookup_bwd<N, T>, blocks(N, sum_units<N>(p)), 0);
  else launch(prompt_lookup_bwd<1, T>, blocks(1, sum_units<1>(p)), 0);
}

}  // namespace peft_kernels::cuda
