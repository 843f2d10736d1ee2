// What device code calls by one name on a GPU and in the emulation on the CPU (csrc/simt).
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#else
#include <bit>

#include "../simt/simt.h"
#endif

#define PK_DEVICE __device__ __forceinline__

namespace peft_kernels::cuda {

template <class T>
__host__ __device__ constexpr T least(T a, T b) {
  return a < b ? a : b;
}

#if defined(__CUDACC__)

using Half = __half;
using BFloat16 = __nv_bfloat16;

PK_DEVICE float to_float(float x) { return x; }
PK_DEVICE float to_float(Half x) { return __half2float(x); }
PK_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
PK_DEVICE void from_float(float f, float& out) { out = f; }
PK_DEVICE void from_float(float f, Half& out) { out = __float2half_rn(f); }
PK_DEVICE void from_float(float f, BFloat16& out) { out = __float2bfloat16_rn(f); }
PK_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Global memory is read and written through these alone. V may be a Pack.
template <class V>
PK_DEVICE V load(const V* from) {
  return *from;
}
template <class V>
PK_DEVICE void store(V* to, V value) {
  *to = value;
}

// From global to shared memory without waiting. All that a thread has sent for since it last
// committed is one group; once it has waited, at most PENDING groups are still on their way.
template <class V>
PK_DEVICE void copy(V* to, const V* from) {
  __pipeline_memcpy_async(to, from, sizeof(V));
}
PK_DEVICE void commit_copies() { __pipeline_commit(); }
template <int PENDING>
PK_DEVICE void wait_for_copies() {
  __pipeline_wait_prior(PENDING);
}

PK_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char buffer[];
  return buffer;
}

// A barrier of the whole grid, for a cooperative launch: what a block writes before it arrives,
// every block may read after it has waited. For all threads of a block, and each a barrier of it.
class GridBarrier {
 public:
  PK_DEVICE void arrive() { arrive(grid_); }
  PK_DEVICE void wait() { wait(grid_); }

 private:
  // Older toolkits have no halves; there everyone meets where they would wait.
  template <class G>
  PK_DEVICE void arrive(G& grid) {
    if constexpr (requires { grid.barrier_arrive(); })
      token_ = grid.barrier_arrive();
    else
      __syncthreads();
  }
  template <class G>
  PK_DEVICE void wait(G& grid) {
    if constexpr (requires { grid.barrier_arrive(); })
      grid.barrier_wait(static_cast<unsigned&&>(token_));
    else
      grid.sync();
  }

  cooperative_groups::grid_group grid_ = cooperative_groups::this_grid();
  unsigned token_ = 0;
};

#else

using Half = _Float16;
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline void from_float(float f, float& out) { out = f; }
inline void from_float(float f, Half& out) { out = static_cast<Half>(f); }
inline void from_float(float f, BFloat16& out) {  // to nearest even; a NaN stays a NaN
  const auto bits = std::bit_cast<uint32_t>(f);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = uint16_t(f == f ? rounded : (bits >> 16) | 0x40);
}
inline float fma(float a, float b, float c) { return a * b + c; }

template <class V>
V load(const V* from) {
  simt::touch(from, sizeof(V), alignof(V), 1);
  return *from;
}
template <class V>
void store(V* to, V value) {
  simt::touch(to, sizeof(V), alignof(V), 2);
  *to = value;
}

template <class V>
void copy(V* to, const V* from) {
  simt::touch(from, sizeof(V), alignof(V), 1);
  simt::self->copies.back().push_back({to, from, sizeof(V)});
}
inline void commit_copies() { simt::self->copies.emplace_back(); }
template <int PENDING>
void wait_for_copies() {
  simt::finish_copies(PENDING);
}

inline char* shared_memory() { return simt::self->block->shared.get(); }

class GridBarrier {
 public:
  void arrive() { round_ = simt::grid_arrive(); }
  void wait() { simt::grid_wait(round_); }

 private:
  unsigned round_ = 0;
};

#endif

// Elements that one instruction moves: 8 or 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// Elements [at, at + N) of a row that ends at end, zero beyond it. WHOLE: the row's beginning is
// aligned, and at and end are multiples of N.
template <bool WHOLE, int N, class T>
PK_DEVICE Pack<T, N> load_pack(const T* row, int at, int end) {
  Pack<T, N> pack{};
  if constexpr (WHOLE) {
    if (at < end) pack = load(reinterpret_cast<const Pack<T, N>*>(row + at));
  } else {
    for (int j = 0; j < N; j++)
      if (at + j < end) pack.v[j] = load(row + at + j);
  }
  return pack;
}

// The same into shared memory: of whole vectors without waiting, a part of its group.
template <bool WHOLE, int N, class T>
PK_DEVICE void copy_pack(T* to, const T* row, int at, int end) {
  auto* place = reinterpret_cast<Pack<T, N>*>(to);
  if constexpr (WHOLE) {
    if (at < end) return copy(place, reinterpret_cast<const Pack<T, N>*>(row + at));
    *place = {};
  } else {
    *place = load_pack<false, N>(row, at, end);
  }
}

PK_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffff, value, lane); }
PK_DEVICE float shuffle_xor(float value, int lanes) {
  return __shfl_xor_sync(0xffffffff, value, lanes);
}

// The sum over the lanes whose numbers differ in bits from that of `first` on, for each of them.
PK_DEVICE float sum_over_lanes(float value, int first = 1) {
  for (int lanes = 16; lanes >= first; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

}  // namespace peft_kernels::cuda
