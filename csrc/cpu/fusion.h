// AdapterFusion by blocks of rows, whose vector lanes are rows.
//
// A panel holds LANES rows as [column][LANES]: x, then what is made of it. The weights' rows are
// broadcast from where they lie, so that the forward packs none of them, and a softmax over the
// adapters or a sum over a bottleneck is a loop over whole vectors. A thread's block of panels
// stays in its L2 from x to y, and each weight is read once a block.
#pragma once
#include <utility>

#include "activations.h"
#include "adapter_fusion.h"
#include "matrix/tile.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t FUSION_BLOCK = 208 * 1024;  // floats of a block's panels: most of a 1 MB L2
constexpr int64_t LEAST_PANELS = 2, MOST_PANELS = 8;
constexpr int64_t SUM_RUN = 16;   // products of a bottleneck that are summed one after the other
constexpr int64_t UNPACKED = 64;  // columns

// Panels of one kind of column: panel b begins at data + b * stride.
struct Panels {
  float* data;
  int64_t stride;
  float* operator[](int64_t b) const { return data + b * stride; }
};

// Hands out the columns of a block's panels, one kind after the other.
struct PanelColumns {
  int64_t used = 0;
  int64_t take(int64_t columns) { return std::exchange(used, used + columns); }
  int64_t floats() const { return used * LANES; }
  int64_t panels() const {
    return std::clamp(FUSION_BLOCK / floats(), LEAST_PANELS, MOST_PANELS);
  }
  Panels at(float* block, int64_t column) const { return {block + column * LANES, floats()}; }
};

inline int64_t panels_of(int64_t rows) { return round_up(rows, LANES) / LANES; }

// ---- panels ----------------------------------------------------------------------------------

inline void pack_rows(const Matrix& m, int64_t row, int64_t rows, Panels to) {
  for (int64_t i = 0; i < rows; i += LANES)
    pack(m.transposed(), 0, m.cols, row + i, std::min<int64_t>(LANES, rows - i), to[i / LANES]);
}

inline void clear(Panels to, int64_t count, int64_t columns) {
  for (int64_t b = 0; b < count; b++) std::memset(to[b], 0, columns * LANES * sizeof(float));
}

inline void fill(const Matrix& row, Panels to, int64_t count) {
  for (int64_t j = 0; j < row.cols; j++) {
    float value = 0;
    with_type(row.dtype, row.at(0, j), [&](auto* from) { value = widen(*from); });
    for (int64_t b = 0; b < count; b++)
      for (int v = 0; v < VECS; v++) store(to[b] + j * LANES + v * V, splat(value));
  }
}

// values[j] += m(row, col + j)
inline void add_row(const Matrix& m, int64_t row, int64_t col, int64_t count, float* values) {
  alignas(64) float buffer[UNPACKED];
  const float* terms = float_rows(m, row, 1, col, count, buffer).data;
  if (m.dtype == DType::f32 && m.col_stride != 1) {
    for (int64_t j = 0; j < count; j++) values[j] += terms[j * m.col_stride];
    return;
  }
  int64_t j = 0;
  for (; j + V <= count; j += V) store(values + j, load(values + j) + load(terms + j));
  for (; j < count; j++) values[j] += terms[j];
}

// Rows [row, row + lanes) of m from a panel, plus those of added, if it isn't null.
inline void unpack_panel(const float* panel, int64_t row, int64_t lanes, const Matrix& m,
                         const Matrix* added = nullptr) {
  alignas(64) float rows[LANES][UNPACKED];
  for (int64_t col = 0; col < m.cols; col += UNPACKED) {
    const int64_t count = std::min(UNPACKED, m.cols - col);
    for (int64_t j = 0; j < count; j += B)
      for (int64_t i = 0; i < LANES; i += B) {
        Block block[B]{};
        for (int64_t c = 0; c < std::min<int64_t>(B, count - j); c++)
          block[c] = load_block(panel + (col + j + c) * LANES + i);
        transpose(block);
        for (int r = 0; r < B; r++) std::memcpy(&rows[i + r][j], &block[r], sizeof(Block));
      }
    for (int64_t i = 0; i < lanes; i++) {
      if (added) add_row(*added, row + i, col, count, rows[i]);
      store_row(m, row + i, col, rows[i], count);
    }
  }
}

inline void unpack_rows(Panels from, int64_t row, int64_t rows, const Matrix& m,
                        const Matrix* added = nullptr) {
  for (int64_t i = 0; i < rows; i += LANES)
    unpack_panel(from[i / LANES], row + i, std::min<int64_t>(LANES, rows - i), m, added);
}

// out[b][j] += sum_p g(j, p) in[b][p] for rows [begin, end) of g.
inline void add_product_rows(const Matrix& g, int64_t begin, int64_t end, Panels in, Panels out,
                             int64_t count) {
  const Scratch buffer(g.dtype == DType::f32 ? 0 : ROWS * g.cols);
  for (int64_t j = begin; j < end; j += ROWS)
    with_rows(end - j, [&](auto R) {
      const Rows rows = float_rows(g, j, R, 0, g.cols, buffer);
      for (int64_t b = 0; b < count; b++) {
        float* to = out[b] + j * LANES;
        Vec tile[ROWS][VECS]{};
        accumulate<R>(g.cols, rows, in[b], LANES, tile);
        for (int i = 0; i < R; i++)
          for (int v = 0; v < VECS; v++) {
            float* sum = to + i * LANES + v * V;
            store(sum, load(sum) + tile[i][v]);
          }
      }
    });
}

inline void add_product(const Matrix& g, Panels in, Panels out, int64_t count,
                        const Parallel& parallel) {
  const int64_t units = round_up(g.rows, ROWS) / ROWS;
  const int64_t tasks = std::clamp<int64_t>(units, 1, parallel.threads);
  parallel(tasks, [&](int64_t task) {
    const int64_t begin = units * task / tasks * ROWS, end = units * (task + 1) / tasks * ROWS;
    add_product_rows(g, begin, std::min(g.rows, end), in, out, count);
  });
}

inline Parallel one_thread() {
  return {1, [](int64_t tasks, void (*task)(void*, int64_t), void* ctx) {
            for (int64_t i = 0; i < tasks; i++) task(ctx, i);
          }};
}

// Calls f(row, end, block of panels, threads of its own) for all blocks of [0, rows). Threads share
// the panels, or where those are fewer the columns of each product.
template <class F>
inline void by_blocks(const PanelColumns& columns, int64_t rows, const Parallel& parallel, F f) {
  const int64_t units = panels_of(rows), block = columns.panels();
  const auto run = [&](int64_t begin, int64_t end, const Parallel& inner) {
    const Scratch panels(std::min(block, end - begin) * columns.floats());
    for (int64_t unit = begin; unit < end; unit += block)
      f(unit * LANES, std::min(rows, std::min(end, unit + block) * LANES), panels, inner);
  };
  if (units < parallel.threads) return run(0, units, parallel);
  parallel(parallel.threads, [&](int64_t task) {
    run(units * task / parallel.threads, units * (task + 1) / parallel.threads, one_thread());
  });
}

// ---- forward ---------------------------------------------------------------------------------

// From z to a, in place; the sum of a w over the adapter's columns.
template <Activation A>
PK_INLINE Vec activate_and_score(int64_t size, float* z, const float* w) {
  Vec sum{};
  for (int64_t r = 0; r < size; r += SUM_RUN) {
    Vec run{};
    for (int64_t i = r; i < std::min(size, r + SUM_RUN); i++) {
      const Vec a = activation_of<A>(load(z + i * LANES));
      store(z + i * LANES, a);
      run += a * load(w + i * LANES);
    }
    sum += run;
  }
  return sum;
}

// Over rows of LANES scores, in place.
inline void softmax(int64_t adapters, float* scores) {
  Vec most = load(scores), total{};
  for (int64_t n = 1; n < adapters; n++) {
    const Vec score = load(scores + n * LANES);
    most = score > most ? score : most;
  }
  for (int64_t n = 0; n < adapters; n++) {
    const Vec e = exp(load(scores + n * LANES) - most);
    store(scores + n * LANES, e);
    total += e;
  }
  for (int64_t n = 0; n < adapters; n++)
    store(scores + n * LANES, load(scores + n * LANES) / total);
}

// V lanes of a panel, from z [R] and w [R + N] to p a, in z's place, and p, in w's first N columns.
// The scores take the place of w's last N meanwhile: no column of w is written before it is read,
// as no size is below 1.
template <Activation A>
PK_INLINE void fuse_lanes(const FusionInputs& in, float* z, float* w) {
  const int64_t ranks = in.down_weight.rows;
  float* scores = w + ranks * LANES;
  for (int64_t n = 0, r = 0; n < in.adapters; r += in.sizes[n++]) {
    float* score = scores + n * LANES;
    const Vec sum = activate_and_score<A>(in.sizes[n], z + r * LANES, w + r * LANES);
    store(score, sum + load(score));
  }
  softmax(in.adapters, scores);
  for (int64_t n = 0, r = 0; n < in.adapters; n++) {
    const Vec p = load(scores + n * LANES);
    store(w + n * LANES, p);
    for (const int64_t end = r + in.sizes[n]; r < end; r++)
      store(z + r * LANES, p * load(z + r * LANES));
  }
}

inline void fuse(const FusionInputs& in, int64_t count, Panels z, Panels w) {
  with_activation(in.activation, [&](auto A) {
    for (int64_t b = 0; b < count; b++)
      for (int v = 0; v < VECS; v++) fuse_lanes<A>(in, z[b] + v * V, w[b] + v * V);
  });
}

inline void fusion_forward(const AdapterFusionForward& f, const Parallel& parallel) {
  const FusionInputs& in = f.in;
  const Matrix mix_bias = in.mix_bias.transposed();
  const int64_t k = in.x.cols, n = f.y.cols, ranks = in.down_weight.rows;
  PanelColumns columns;
  const int64_t x_column = columns.take(std::max(k, n)), y_column = x_column;
  const int64_t q_column = in.query ? columns.take(in.query->cols) : x_column;
  const int64_t z_column = columns.take(ranks), w_column = columns.take(in.score_weight.rows);
  by_blocks(columns, in.x.rows, parallel, [&](int64_t row, int64_t end, float* block,
                                              const Parallel& inner) {
    const int64_t rows = end - row, count = panels_of(rows);
    const Panels x = columns.at(block, x_column), q = columns.at(block, q_column);
    const Panels z = columns.at(block, z_column), w = columns.at(block, w_column);
    const Panels y = columns.at(block, y_column);
    pack_rows(in.x, row, rows, x);
    if (in.query) pack_rows(*in.query, row, rows, q);
    fill(in.down_bias, z, count), fill(in.score_bias, w, count);
    add_product(in.down_weight, x, z, count, inner);
    add_product(in.score_weight, q, w, count, inner);
    unpack_rows(z, row, rows, f.z), unpack_rows(w, row, rows, f.w);
    fuse(in, count, z, w);
    unpack_rows(w, row, rows, f.p);
    clear(y, count, n);
    add_product(in.mix_weight, z, y, count, inner);
    add_product(mix_bias, w, y, count, inner);
    unpack_rows(y, row, rows, f.y, f.residual);
  });
}

}  // namespace peft_kernels::PK_ISA
