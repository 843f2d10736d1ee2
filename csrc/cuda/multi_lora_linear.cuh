// Multi-LoRA linear for few rows, in one launch:
//
//   1. S[i, q] = A_g[q] . x[i], at g's true rank, spread over the warps of the grid.
//   2. Meanwhile, until every block has done its part of S, the base product: a block takes tiles
//      of columns, and W is read once for as many rows as sums fit in registers.
//   3. y[i] = W x[i] + b + scale_g sum_q S[i, q] B_g[q], rounded and written once.
//
// Every sum goes in an order that depends on n, k and the rank alone: not on how many rows there
// are, nor on which block or schedule computes it. A row reads nothing of another row's adapter.
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

// ---- the plan --------------------------------------------------------------------------------

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
