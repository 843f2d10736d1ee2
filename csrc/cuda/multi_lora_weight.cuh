// What W x of multi_lora_linear.cuh is made of: how x and W come to a warp, and their product.
#pragma once
#include "multi_lora_plan.cuh"

namespace peft_kernels::cuda {

// Columns of the outputs, all of one bank.
struct Tile {
  int bank, column, columns;    // of the bank's columns
  int first_of_bank, s_column;  // where the bank's columns begin in y, and in S
};

template <class T, class A>
PK_DEVICE Tile find_tile(const Params<T, A>& p, int index) {
  Tile tile{};
  for (; index >= p.banks[tile.bank].tiles; tile.bank++) {
    index -= p.banks[tile.bank].tiles;
    tile.first_of_bank += p.banks[tile.bank].width;
    tile.s_column += p.banks[tile.bank].max_pages * PAGE;
  }
  tile.column = index * p.columns;
  tile.columns = least(p.columns, p.banks[tile.bank].width - tile.column);
  return tile;
}

// Sends for columns [k0, k0 + k_chunk) of the rows of x, with zeros beyond its ends. A lane has
// VECTOR columns, which it multiplies a PIECE at a time; all lanes' first pieces lie side by side,
// then all second ones, so that a warp reads shared memory without conflicts.
template <bool WHOLE, int ROWS, class T, class A>
PK_DEVICE void stage_x(const Params<T, A>& p, int first, int k0, T* staged) {
  constexpr int N = VECTOR<T>;
#pragma unroll 1
  for (int at = threadIdx.x * PIECE; at < p.k_chunk; at += THREADS * PIECE) {
    const int lane = at / N % 32, place = at / (32 * N) * 32 * N + at % N * 32 + lane * PIECE;
    const T* x = p.x + first * p.x_stride;
    T* to = staged + place;
#pragma unroll 4
    for (int i = 0; i < ROWS; i++, x += p.x_stride, to += p.k_chunk)
      copy_pack<WHOLE, PIECE>(to, x, k0 + at, first + i < p.m ? p.k : 0);
  }
  commit_copies();
}

// A warp's way through W, a step for each unit of k. What a lane multiplies it has sent for itself,
// so that no thread waits for another.
template <bool WHOLE, class T>
struct WeightStream {
  static constexpr int N = VECTOR<T>;
  const T* weight;  // the row of the first column
  int64_t stride;
  int columns, k;    // how many of the warp's columns there are
  int unit, begin;   // the lane's elements are begin, ..., begin + N - 1 of every unit
  Pack<T, N>* ring;  // [STAGES][COLUMNS][32]

  PK_DEVICE Pack<T, N>& place(int step, int c) const {
    return ring[(step % STAGES * COLUMNS + c) * 32 + threadIdx.x % 32];
  }

  PK_DEVICE void fetch(int step) const {
    if (step * unit < k)
#pragma unroll
      for (int c = 0; c < COLUMNS; c++)
        copy_pack<WHOLE, N>(place(step, c).v, weight + c * stride, step * unit + begin,
                            c < columns ? k : 0);
    commit_copies();
  }

  PK_DEVICE void start() const {
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
  }

  // Gives the step whose turn it is, and sends for another in the place of the one before it.
  PK_DEVICE void take(int step, Pack<T, N> (&packs)[COLUMNS]) const {
    wait_for_copies<STAGES - 2>();
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) packs[c] = place(step, c);
    fetch(step + STAGES - 1);
  }
};

// A warp's share of a tile: COLUMNS columns from column on, and of k one of the parts.
struct Share {
  int column, part, parts;
};

PK_DEVICE Share own_share(int tile_columns) {
  const int warp = threadIdx.x / 32, groups = tile_columns / COLUMNS;
  return {warp % groups * COLUMNS, warp / groups, WARPS / groups};
}

template <bool WHOLE, class T, class A>
PK_DEVICE WeightStream<WHOLE, T> weight_stream(const Params<T, A>& p, const Tile& tile,
                                               char* stages) {
  constexpr int N = VECTOR<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Share own = own_share(p.columns);
  const int64_t row = tile.first_of_bank + tile.column + own.column;
  return {.weight = p.weight + row * p.weight_stride,
          .stride = p.weight_stride,
          .columns = tile.columns - own.column,
          .k = p.k,
          .unit = own.parts * 32 * N,
          .begin = (own.part * 32 + lane) * N,
          .ring = reinterpret_cast<Pack<T, N>*>(stages) + warp * STAGES * COLUMNS * 32};
}

// sums[i * COLUMNS + c] += x[i] . w[c], over this lane's N elements.
template <int ROWS, class T, int N>
PK_DEVICE void multiply(const T* x, int x_stride, const Pack<T, N> (&w)[COLUMNS],
                        float (&sums)[ROWS * COLUMNS]) {
#pragma unroll
  for (int piece = 0; piece < N; piece += PIECE)
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const auto* place = reinterpret_cast<const Pack<T, PIECE>*>(x + i * x_stride + piece * 32);
      const Pack<T, PIECE> xs = *place;
#pragma unroll
      for (int j = 0; j < PIECE; j++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
          sums[i * COLUMNS + c] =
              fma(to_float(xs.v[j]), to_float(w[c].v[piece + j]), sums[i * COLUMNS + c]);
    }
}

// Sums over the lanes: each ends up with a part of the COUNT totals, in the first of its sums.
// Halves change hands as long as there are any, and a total's tree is the same however many there
// are. Returns the number of the lane's first total.
template <int HELD, int LANES, int COUNT>
PK_DEVICE int spread_totals(float (&sums)[COUNT]) {
  if constexpr (LANES == 0) {
    return 0;
  } else if constexpr (HELD == 1) {
    sums[0] += shuffle_xor(sums[0], LANES);
    return spread_totals<1, LANES / 2>(sums);
  } else {
    constexpr int HALF = HELD / 2;
    const bool upper = threadIdx.x & LANES;
#pragma unroll
    for (int v = 0; v < HALF; v++) {
      const float kept = upper ? sums[v + HALF] : sums[v];
      sums[v] = kept + shuffle_xor(upper ? sums[v] : sums[v + HALF], LANES);
    }
    return (upper ? HALF : 0) + spread_totals<HALF, LANES / 2>(sums);
  }
}

}  // namespace peft_kernels::cuda
