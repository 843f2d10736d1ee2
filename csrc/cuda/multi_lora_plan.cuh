// The parameters of the kernel of multi_lora_linear.cuh, its tiles and its shared memory.
#pragma once
#include "device.cuh"

namespace peft_kernels::cuda {

constexpr int PAGE = 8;  // rank rows
constexpr int MAX_BANKS = 4, MAX_ROWS = 16;
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int COLUMNS = 4;                 // that a warp's base sums are of
constexpr int ROW_SUMS = WARPS * COLUMNS;  // of a tile: its columns times the parts that k is in
constexpr int STAGES = 3;                  // of W: one that is multiplied, and those on their way
constexpr int LOADS = 4;                   // of an adapter, on their way to a lane together
constexpr int PIECE = 4;                   // elements of x that a lane multiplies at once
constexpr int64_t MAX_SIZE = 1 << 30;      // of each of m, n, k: they, and not offsets, are ints

template <class T>
constexpr int VECTOR = 16 / sizeof(T);  // elements of a 16-byte load

// Many adapters of a slice of the outputs, in pages of PAGE rank rows.
template <class A>
struct Bank {
  const A* a;            // [pages * PAGE, k]
  const A* b;            // [pages * PAGE, width]
  const int32_t* table;  // [slots, max_pages]
  const int32_t* ranks;  // [slots]
  const float* scales;   // [slots]
  int width, max_pages;
  int tiles;             // of its columns; set by plan()
};

template <class T, class A>
struct Params {
  const T* x;          // [m, k], rows contiguous
  const T* weight;     // [n, k], rows contiguous
  const T* bias;       // [n], or null
  T* y;                // [m, n]
  float* s;            // [m, s_columns], the banks' side by side
  const int32_t* ids;  // entry i serves rows_per_id rows
  int64_t x_stride, weight_stride;
  bool has_base;       // W x + b; without it the rest is added to y
  int m, n, k, rows_per_id, slots, s_columns, bank_count;
  Bank<A> banks[MAX_BANKS];

  // Set by plan().
  int tiles, columns;  // how many, and of how many columns: 8, 16 or 32
  int k_chunk;         // columns of x that shared memory holds
};

struct Plan {
  bool whole;  // every row of every matrix is a number of aligned vectors
  int rows;    // that share one reading of W: 4, 8 or 16
  int64_t shared_bytes;
};

// A block's shared memory: Adapters, STAGES of W for each lane, the sums of two tiles, and x.
struct Adapters {
  int32_t slot[MAX_ROWS];
  int32_t rank[MAX_BANKS][MAX_ROWS];  // 0 for a row without an adapter
};
static_assert(sizeof(Adapters) % 16 == 0);
constexpr int64_t STAGE_BYTES = THREADS * COLUMNS * 16;

// Whether rows of the given length begin and end with 16-byte vectors.
inline bool is_whole(const void* data, int64_t row_bytes, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(data) | uint64_t(row_bytes | stride_bytes)) % 16 == 0;
}

// Chooses the tiles and what shared memory holds; shared_limit is what a block may have of it.
template <class T, class A>
Plan plan(Params<T, A>& p, int64_t shared_limit) {
  constexpr int64_t T_SIZE = sizeof(T), A_SIZE = sizeof(A);
  // Some hundred tiles keep a GPU's multiprocessors busy; where x doesn't fit in shared memory, a
  // wide tile reads it less often. By n and k alone: the width decides in which order sums go.
  const bool many = p.n > 8192 || (p.n > 2048 && p.k * T_SIZE > 12288);
  p.columns = !p.has_base || many ? 32 : p.n > 1024 ? 16 : 8;
  p.tiles = 0;
  bool whole = is_whole(p.x, p.k * T_SIZE, p.x_stride * T_SIZE) &&
               is_whole(p.weight, p.k * T_SIZE, p.weight_stride * T_SIZE);
  for (int j = 0; j < p.bank_count; j++) {
    Bank<A>& bank = p.banks[j];
    bank.tiles = (bank.width + p.columns - 1) / p.columns;
    p.tiles += bank.tiles;
    whole = whole && is_whole(bank.a, p.k * A_SIZE, 0) && is_whole(bank.b, bank.width * A_SIZE, 0);
  }
  if (!p.has_base) return {whole, MAX_ROWS, sizeof(Adapters)};
  // Odd sizes are rare: they have one kernel, that for few rows.
  const int rows = !whole || p.m <= 4 ? 4 : p.m <= 8 ? 8 : MAX_ROWS;
  const int64_t sums = 2 * rows * ROW_SUMS * sizeof(float);
  const int64_t fixed = sizeof(Adapters) + STAGES * STAGE_BYTES + sums;
  const int unit = 32 * VECTOR<T> * (ROW_SUMS / p.columns);
  const int64_t fits = (shared_limit - fixed) / (rows * T_SIZE * unit);
  const int64_t needed = (p.k + unit - 1) / unit;
  p.k_chunk = int(least(fits > 1 ? fits : 1, needed > 1 ? needed : 1)) * unit;
  return {whole, rows, fixed + rows * p.k_chunk * T_SIZE};
}

}  // namespace peft_kernels::cuda
