// Multi-LoRA linear for few rows, in one launch:
//
//   1. S[i, q] = A_g[q] . x[i], at g's true rank, spread over the warps of the grid.
//   2. Meanwhile, until every block has done its part of S, the base product: a block takes tiles
//      of columns, and W is read once for as many rows as sums fit in registers.
//   3. y[i] = W x[i] + b + scale_g sum_q S[i, q] B_g[q], rounded and written once.
//
// Every sum goes in an order that depends on n, k and the rank alone: not on how many rows there
// are, nor on which block or schedule computes it. A row reads nothing of another row's adapter.
//
// Sizes, tiles and shared memory are in multi_lora_plan.cuh; how W and x come to a warp, and their
// product, are in multi_lora_weight.cuh.
#pragma once
#include "multi_lora_weight.cuh"

namespace peft_kernels::cuda {

// ---- 1. S = A x ------------------------------------------------------------------------------

template <class T, class A>
PK_DEVICE void find_adapters(const Params<T, A>& p, int first, int rows, Adapters& adapters) {
  for (int t = threadIdx.x; t < rows * p.bank_count; t += THREADS) {
    const int i = t % rows, j = t / rows;
    const int slot = load(p.ids + (first + i) / p.rows_per_id);
    const bool known = slot >= 0 && slot < p.slots;
    const int rank = known ? load(p.banks[j].ranks + slot) : 0;
    adapters.rank[j][i] = rank < 0 ? 0 : least(rank, p.banks[j].max_pages * PAGE);
    if (j == 0) adapters.slot[i] = slot;
  }
}

template <class A>
PK_DEVICE int64_t rank_row(const Bank<A>& bank, int slot, int q) {
  const int32_t page = load(bank.table + int64_t(slot) * bank.max_pages + q / PAGE);
  return int64_t(page) * PAGE + q % PAGE;
}

// This lane's part of a . x.
template <bool WHOLE, class T, class A>
PK_DEVICE float lane_dot(const A* a, const T* x, int k) {
  constexpr int N = least(VECTOR<T>, VECTOR<A>);
  float sum = 0;
  for (int at = threadIdx.x % 32 * N; at < k; at += LOADS * 32 * N) {
    Pack<A, N> as[LOADS];
    Pack<T, N> xs[LOADS];
#pragma unroll
    for (int u = 0; u < LOADS; u++) {
      as[u] = load_pack<WHOLE, N>(a, at + u * 32 * N, k);
      xs[u] = load_pack<WHOLE, N>(x, at + u * 32 * N, k);
    }
#pragma unroll
    for (int u = 0; u < LOADS; u++)
#pragma unroll
      for (int j = 0; j < N; j++) sum = fma(to_float(as[u].v[j]), to_float(xs[u].v[j]), sum);
  }
  return sum;
}

// S of rows rows from first on. The warps of the grid take the rank rows in turns, neighbours in
// different blocks.
template <bool WHOLE, class T, class A>
PK_DEVICE void shrink(const Params<T, A>& p, int first, int rows, const Adapters& adapters) {
  const int warps = gridDim.x * WARPS;
  int turn = blockIdx.x + gridDim.x * (threadIdx.x / 32), s_column = 0;
  for (int j = 0; j < p.bank_count; j++) {
    const Bank<A>& bank = p.banks[j];
    const int bank_columns = bank.max_pages * PAGE;
    for (int i = 0; i < rows; i++) {
      const int rank = adapters.rank[j][i];
      const T* x = p.x + (first + i) * p.x_stride;
      float* s = p.s + int64_t(first + i) * p.s_columns + s_column;
      for (; turn < rank; turn += warps) {
        const A* a = bank.a + rank_row(bank, adapters.slot[i], turn) * p.k;
        const float dot = sum_over_lanes(lane_dot<WHOLE>(a, x, p.k));
        if (threadIdx.x % 32 == 0) store(s + turn, dot);
      }
      turn -= rank;
      for (int q = rank + blockIdx.x * THREADS + threadIdx.x; q < bank_columns; q += warps * 32)
        store(s + q, 0.0f);
    }
    s_column += bank_columns;
  }
}

// ---- 2. W x ----------------------------------------------------------------------------------

// The tile's sums, as [parts of k][ROWS][columns]. The rows' adapters and x come into shared memory
// with a block's first tile of these rows (the very first sends for x before S is computed), and
// later ones find x there, if all of it has room.
template <bool WHOLE, int ROWS, class T, class A>
PK_DEVICE void multiply_base(const Params<T, A>& p, const WeightStream<WHOLE, T>& weight, int first,
                             int rows, bool is_first_tile, Adapters& adapters, T* staged,
                             float* tile_sums) {
  constexpr int TOTALS = ROWS * COLUMNS, COPIES = TOTALS < 32 ? 32 / TOTALS : 1;
  float sums[TOTALS] = {};
  int step = 0;
  const T* x = staged + weight.begin - threadIdx.x % 32 * (VECTOR<T> - PIECE);
  for (int k0 = 0; k0 == 0 || k0 < p.k; k0 += p.k_chunk) {
    if (is_first_tile || p.k_chunk < p.k) {
      const bool is_first_chunk = is_first_tile && k0 == 0, is_sent_for = is_first_chunk && !first;
      if (!is_sent_for) __syncthreads();  // nobody reads what was there
      if (is_first_chunk && p.m > ROWS) find_adapters(p, first, rows, adapters);
      if (!is_sent_for) stage_x<WHOLE, ROWS>(p, first, k0, staged);
      wait_for_copies<0>();
      __syncthreads();
    }
    const int end = least(p.k_chunk, p.k - k0);
#pragma unroll 1
    for (int at = 0; at < end; at += weight.unit) {
      Pack<T, VECTOR<T>> w[COLUMNS];
      weight.take(step++, w);
      multiply<ROWS>(x + at, p.k_chunk, w, sums);
    }
  }
  const int number = spread_totals<TOTALS, 16>(sums);
  if (threadIdx.x % COPIES) return;
  const Share own = own_share(p.columns);
#pragma unroll
  for (int v = 0; v < TOTALS * COPIES / 32; v++) {
    const int i = (number + v) / COLUMNS, c = (number + v) % COLUMNS;
    tile_sums[(own.part * ROWS + i) * p.columns + own.column + c] = sums[v];
  }
}

// ---- 3. y += scale S B -----------------------------------------------------------------------

// A row of a tile: its adapter, and its part of S.
struct TileRow {
  int slot, rank;
  const float* s;
};

// sums[r][j] = this lane's part of sum_q s[q] B_g[q, column + j], j < N, for R rows: lanes side by
// side have columns side by side, and the others other rank rows.
template <bool WHOLE, class A, int R, int N>
PK_DEVICE void lane_updates(const Bank<A>& bank, const TileRow (&rows)[R], int column,
                            int side_by_side, float (&sums)[R][N]) {
  constexpr int U = LOADS / R;
  const int step = 32 / side_by_side;
  int most = 0;
  for (int r = 0; r < R; r++) most = rows[r].rank > most ? rows[r].rank : most;
#pragma unroll 1
  for (int first = threadIdx.x % 32 / side_by_side; first < most; first += U * step) {
    Pack<A, N> b[R][U];
    float factor[R][U];
    int64_t place[R][U];
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int u = 0; u < U; u++) {  // all of them sent for, before any place is needed
        const int q = first + u * step;
        place[r][u] = q < rows[r].rank ? rank_row(bank, rows[r].slot, q) : 0;
        factor[r][u] = q < rows[r].rank ? load(rows[r].s + q) : 0;
      }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int u = 0; u < U; u++)
        b[r][u] = load_pack<WHOLE, N>(bank.b + place[r][u] * bank.width, column,
                                      first + u * step < rows[r].rank ? bank.width : 0);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int u = 0; u < U; u++)
#pragma unroll
        for (int j = 0; j < N; j++)
          sums[r][j] = fma(factor[r][u], to_float(b[r][u].v[j]), sums[r][j]);
  }
}

// The sum that the lane's column has, of those that lane_updates() has spread over the lanes.
template <int N>
PK_DEVICE float own_column(const float (&sums)[N], int side_by_side) {
  const int lane = threadIdx.x % 32;
  float result = 0;
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float value = shuffle(sum_over_lanes(sums[j], side_by_side), lane / N);
    if (lane % N == j) result = value;
  }
  return result;
}

// Writes the tile: a warp has every WARPS-th row, a lane a column.
template <bool BASE, bool WHOLE, int ROWS, class T, class A>
PK_DEVICE void write_tile(const Params<T, A>& p, const Tile& tile, int first, int rows,
                          const Adapters& adapters, const float* tile_sums) {
  constexpr int N = VECTOR<A>, R = (ROWS + WARPS - 1) / WARPS;
  const Bank<A>& bank = p.banks[tile.bank];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side_by_side = p.columns / N;
  const int column = tile.first_of_bank + tile.column + lane;
  const bool has_column = lane < tile.columns;
  TileRow own[R];
  float scales[R], sums[R][N] = {};
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int i = warp + r * WARPS, slot = adapters.slot[i];
    const int rank = i < rows ? adapters.rank[tile.bank][i] : 0;
    own[r] = {slot, rank, p.s + int64_t(first + i) * p.s_columns + tile.s_column};
    scales[r] = rank > 0 ? load(bank.scales + slot) : 0;
  }
  lane_updates<WHOLE>(bank, own, tile.column + lane % side_by_side * N, side_by_side, sums);
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int i = warp + r * WARPS;
    if (i >= rows || (!BASE && own[r].rank == 0)) continue;
    T* y = p.y + int64_t(first + i) * p.n + column;
    float total = 0;
    if (BASE && has_column) {
      for (int part = 0; part < ROW_SUMS / p.columns; part++)
        total += tile_sums[(part * ROWS + i) * p.columns + lane];
      if (p.bias) total += to_float(load(p.bias + column));
    }
    if (!BASE && has_column) total = to_float(load(y));
    if (own[r].rank > 0) total = fma(scales[r], own_column(sums[r], side_by_side), total);
    T rounded;
    from_float(total, rounded);
    if (has_column) store(y, rounded);
  }
}

// ---- the kernel ------------------------------------------------------------------------------

// ROWS rows share a reading of W. Without BASE, the rest is added to y, and rows without an adapter
// aren't touched.
template <bool BASE, bool WHOLE, int ROWS, class T, class A>
__global__ void __launch_bounds__(THREADS, ROWS == MAX_ROWS ? 1 : 2)
    multi_lora_decode(const __grid_constant__ Params<T, A> p) {
  char* shared = shared_memory();
  Adapters& adapters = *reinterpret_cast<Adapters*>(shared);
  char* stages = shared + sizeof(Adapters);
  float* sums = reinterpret_cast<float*>(stages + STAGES * STAGE_BYTES);
  T* staged = reinterpret_cast<T*>(sums + 2 * ROWS * ROW_SUMS);
  GridBarrier barrier;
  const auto start = [&](int index) {
    if (index < p.tiles) weight_stream<WHOLE>(p, find_tile(p, index), stages).start();
  };
  if constexpr (BASE) {  // on its way while S is computed
    start(blockIdx.x);
    stage_x<WHOLE, ROWS>(p, 0, 0, staged);
  }
  for (int first = 0; first < p.m; first += ROWS) {
    if (first) __syncthreads();  // nobody reads the adapters of the rows before
    find_adapters(p, first, least(ROWS, p.m - first), adapters);
    __syncthreads();
    shrink<WHOLE>(p, first, least(ROWS, p.m - first), adapters);
  }
  barrier.arrive();
  bool waits = true;
  int flip = 0;  // tiles have their sums in turns: some warps may still be writing the one before
  for (int first = 0; first < p.m; first += ROWS) {
    const int rows = least(ROWS, p.m - first);
    if (!BASE && p.m > ROWS) {
      if (first) __syncthreads();  // nobody reads the adapters of the rows before
      find_adapters(p, first, rows, adapters);
      __syncthreads();
    }
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      float* tile_sums = sums + (flip ^= 1) * ROWS * ROW_SUMS;
      if constexpr (BASE) {
        const bool is_first = index == int(blockIdx.x);
        multiply_base<WHOLE, ROWS>(p, weight_stream<WHOLE>(p, find_tile(p, index), stages), first,
                                   rows, is_first, adapters, staged, tile_sums);
        const bool is_last = index + int(gridDim.x) >= p.tiles;
        if (!is_last) start(index + gridDim.x);  // on its way while this one is written
        else if (first + ROWS < p.m) start(blockIdx.x);
        __syncthreads();
      }
      if (waits) barrier.wait();
      waits = false;
      write_tile<BASE, WHOLE, ROWS>(p, find_tile(p, index), first, rows, adapters, tile_sums);
    }
  }
  if (waits) barrier.wait();
}

// Calls f with the kernel that the plan asks for.
template <class T, class A, class F>
void with_kernel(const Params<T, A>& p, const Plan& plan, F f) {
  if (!p.has_base) return plan.whole ? f(multi_lora_decode<false, true, MAX_ROWS, T, A>)
                                   : f(multi_lora_decode<false, false, MAX_ROWS, T, A>);
  if (!plan.whole) return f(multi_lora_decode<true, false, 4, T, A>);
  if (plan.rows == 4) return f(multi_lora_decode<true, true, 4, T, A>);
  if (plan.rows == 8) return f(multi_lora_decode<true, true, 8, T, A>);
  return f(multi_lora_decode<true, true, MAX_ROWS, T, A>);
}

}  // namespace peft_kernels::cuda
