// AdapterFusion on the CPU, built once per instruction set; the maths is in ops/adapter_fusion.py.
#include "adapter_fusion.h"

#include "fusion.h"
#include "matrix/row_sums.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t CHUNK_ROWS = 1024;      // whose dpre, dw and p a are held for the gradients
constexpr int64_t CHUNK_TASK_ROWS = 64;   // at least, where many threads share a chunk
constexpr int64_t STRIP_PANELS = 4;       // at most: columns of x that meet one read of dpre
constexpr int64_t STRIPS_PER_THREAD = 2;  // of a gradient, where there are as many columns

// ---- backward by rows ------------------------------------------------------------------------

// to[j * stride + i] = m(i, j)
inline void transpose_columns(const Matrix& m, int64_t col, int64_t end, float* to,
                              int64_t stride) {
  with_type(m.dtype, m.data, [&](auto* from) {
    const auto at = [&](int64_t i, int64_t j) {
      return from + i * m.row_stride + j * m.col_stride;
    };
    for (int64_t j = col; j < end; j += B) {
      const int64_t cols = std::min<int64_t>(B, end - j);
      int64_t i = 0;
      for (; cols == B && m.col_stride == 1 && i + B <= m.rows; i += B) {
        Block block[B];
        for (int b = 0; b < B; b++) block[b] = load_block(at(i + b, j));
        transpose(block);
        for (int b = 0; b < B; b++) std::memcpy(to + (j + b) * stride + i, &block[b], B * 4);
      }
      for (; i < m.rows; i++)
        for (int64_t c = j; c < j + cols; c++) to[c * stride + i] = widen(*at(i, c));
    }
  });
}

// The transpose of a weight, so that its columns can be broadcast: a copy if several panels do it.
class Transposed {
 public:
  Transposed(const Matrix& m, int64_t rows, bool wanted, const Parallel& parallel)
      : copied_(wanted && rows > LANES), data_(copied_ ? m.rows * m.cols : 0),
        matrix_(m.transposed()) {
    if (!copied_) return;
    matrix_ = {data_, DType::f32, m.cols, m.rows, m.rows, 1};
    parallel(panels_of(m.cols), [&](int64_t unit) {
      const int64_t col = unit * LANES;
      transpose_columns(m, col, std::min(m.cols, col + LANES), data_, m.rows);
    });
  }
  operator const Matrix&() const { return matrix_; }

 private:
  bool copied_;
  Scratch data_;
  Matrix matrix_;
};

// V lanes of a block's panels go from z, w, t and p to dpre, dw and p a. t's last N columns are
// dy . v, and then tau.
template <Activation A>
PK_INLINE void activate_and_weigh(int64_t size, float* z, float* slope, const float* t,
                                  float* tau) {
  Vec sum{};
  for (int64_t r = 0; r < size; r += SUM_RUN) {
    Vec run{};
    for (int64_t i = r; i < std::min(size, r + SUM_RUN); i++) {
      const Vec before = load(z + i * LANES), a = activation_of<A>(before);
      store(slope + i * LANES, derivative_of<A>(before));
      store(z + i * LANES, a);
      run += load(t + i * LANES) * a;
    }
    sum += run;
  }
  store(tau, load(tau) + sum);
}

// From tau to tau less its mean under p, in place. All are taken relative to the tau of the largest
// p first: what they have in common would leave rounding errors of its own size, more than
// there is to sum where p is nearly 1.
PK_INLINE void center(int64_t adapters, const float* p, float* tau) {
  Vec most = load(p), common = load(tau), mean{};
  for (int64_t n = 1; n < adapters; n++) {
    const Vec weight = load(p + n * LANES);
    common = weight > most ? load(tau + n * LANES) : common;
    most = weight > most ? weight : most;
  }
  for (int64_t n = 0; n < adapters; n++) {
    const Vec rest = load(tau + n * LANES) - common;
    store(tau + n * LANES, rest);
    mean += load(p + n * LANES) * rest;
  }
  for (int64_t n = 0; n < adapters; n++) store(tau + n * LANES, load(tau + n * LANES) - mean);
}

template <Activation A>
PK_INLINE void fuse_backward_lanes(const FusionInputs& in, float* z, float* w, float* t,
                                   float* slope, const float* p) {
  const int64_t ranks = in.down_weight.rows;
  float* tau = t + ranks * LANES;
  float* dp = w + ranks * LANES;
  for (int64_t n = 0, r = 0; n < in.adapters; r += in.sizes[n++])
    activate_and_weigh<A>(in.sizes[n], z + r * LANES, slope + r * LANES, t + r * LANES,
                          tau + n * LANES);
  center(in.adapters, p, tau);
  for (int64_t n = 0, r = 0; n < in.adapters; n++) {
    const Vec weight = load(p + n * LANES), d = weight * load(tau + n * LANES);
    store(dp + n * LANES, d);
    for (const int64_t end = r + in.sizes[n]; r < end; r++) {
      const int64_t at = r * LANES;
      const Vec a = load(z + at), dpre = weight * load(t + at) + d * load(w + at);
      store(z + at, load(slope + at) * dpre);
      store(w + at, d * a);
      store(slope + at, weight * a);
    }
  }
}

// What the gradients of the parameters are sums of, for a chunk of rows: [columns][rows], padded so
// that the columns don't share the sets of a cache.
struct Factor {
  int64_t columns, stride;
  Scratch data;
  Scratch lost;  // by the last places of the columns' sums

  Factor(int64_t factor_columns, bool wanted, int64_t rows)
      : columns(factor_columns), stride(rows + LANES), data(wanted ? columns * stride : 0),
        lost(columns), wanted_(wanted) {
    std::memset(lost, 0, columns * sizeof(float));
  }

  // A block's columns, with the lanes beyond its rows.
  void take(Panels from, int64_t count, int64_t row) const {
    for (int64_t b = 0; wanted_ && b < count; b++)
      for (int64_t j = 0; j < columns; j++)
        std::memcpy(data + j * stride + row + b * LANES, from[b] + j * LANES, LANES * 4);
  }
  Matrix matrix(int64_t first, int64_t count, int64_t rows) const {
    return {data + first * stride, DType::f32, count, rows, stride, 1};
  }

 private:
  bool wanted_;
};

struct Backward {
  const AdapterFusionBackward& b;
  const FusionInputs& in = b.in;
  const Parallel& parallel;
  int64_t m = b.dy.rows, n = b.dy.cols, ranks = b.z.cols, chunk = chunk_rows();
  bool has_query_gradient = b.dq || (b.dx && !in.query);
  bool has_scores = b.dx || b.dq || b.d_down || b.d_score;
  Transposed mix{in.mix_weight, m, has_scores, parallel};                   // [R, n]
  Transposed mix_bias{in.mix_bias.transposed(), m, has_scores, parallel};  // [N, n]
  Transposed down{in.down_weight, m, b.dx != nullptr, parallel};           // [k, R]
  Transposed score{in.score_weight, m, has_query_gradient, parallel};      // [d, R + N]
  Factor dpre{ranks, b.d_down != nullptr, chunk};
  Factor dw{b.w.cols, b.d_score != nullptr, chunk};
  Factor mixed{b.w.cols, b.d_mix != nullptr, chunk};  // p a, then p

  int64_t chunk_rows() const {
    const int64_t shared = round_up(parallel.threads * CHUNK_TASK_ROWS, LANES);
    return std::min(std::max(CHUNK_ROWS, shared), round_up(m, LANES));
  }
};

// The columns of a block's panels. dx and dq take the place of dy, dpre that of z, dw that of w,
// and p a that of act', before p.
struct BackwardColumns : PanelColumns {
  int64_t dy, z, w, t, slope, p;

  explicit BackwardColumns(const Backward& s)
      : dy(take(std::max({s.n, s.in.x.cols, s.in.queries().cols}))), z(take(s.ranks)),
        w(take(s.b.w.cols)), t(take(s.b.w.cols)), slope(take(s.ranks)), p(take(s.b.p.cols)) {}
};

// The panels of rows [row, end): dx, dq and the factors, which lie at their place in the chunk.
inline void backward_block(const Backward& s, const BackwardColumns& columns, int64_t row,
                           int64_t end, int64_t chunk_row, float* block,
                           const Parallel& inner) {
  const AdapterFusionBackward& b = s.b;
  const int64_t rows = end - row, count = panels_of(rows);
  const Panels dy = columns.at(block, columns.dy), z = columns.at(block, columns.z);
  const Panels w = columns.at(block, columns.w), t = columns.at(block, columns.t);
  const Panels slope = columns.at(block, columns.slope), p = columns.at(block, columns.p);
  const Panels dv = columns.at(block, columns.t + s.ranks);
  pack_rows(b.z, row, rows, z), pack_rows(b.w, row, rows, w), pack_rows(b.p, row, rows, p);
  clear(t, count, b.w.cols);
  if (s.has_scores) {
    pack_rows(b.dy, row, rows, dy);
    add_product(s.mix, dy, t, count, inner);
    add_product(s.mix_bias, dy, dv, count, inner);
  }
  with_activation(s.in.activation, [&](auto A) {
    for (int64_t i = 0; i < count; i++)
      for (int v = 0; v < VECS * V; v += V)
        fuse_backward_lanes<A>(s.in, z[i] + v, w[i] + v, t[i] + v, slope[i] + v, p[i] + v);
  });
  s.dpre.take(z, count, row - chunk_row);
  s.dw.take(w, count, row - chunk_row);
  s.mixed.take(slope, count, row - chunk_row);
  if (b.dx) {
    clear(dy, count, b.dx->cols);
    add_product(s.down, z, dy, count, inner);
    if (!s.in.query) add_product(s.score, w, dy, count, inner);
    unpack_rows(dy, row, rows, *b.dx);
  }
  if (b.dq) {
    clear(dy, count, b.dq->cols);
    add_product(s.score, w, dy, count, inner);
    unpack_rows(dy, row, rows, *b.dq);
  }
}

// ---- gradients of the parameters -------------------------------------------------------------

// out[R, c] += factor x for the chunk's rows, and a sum over rows for each column of the factor.
// The factor's last columns go to rest, if it isn't null.
struct Gradient {
  const Factor* factor;
  Matrix x;
  Matrix out;
  const Matrix* rest;
  float* sums;
};

struct Strip {
  int64_t row, rows;  // the chunk
  int64_t col, cols;
};

// Columns [col, col + cols) of out, by panels; out has rows or columns that are contiguous.
inline void add_strip(const Matrix& factor, const Strip& s, const float* x, const Matrix& out) {
  const Scratch panels(panels_of(s.cols) * LANES * out.rows);
  const Panels to{panels, LANES * out.rows};
  if (s.row == 0)
    clear(to, panels_of(s.cols), out.rows);
  else
    pack(out, 0, out.rows, s.col, s.cols, panels);
  add_product(factor, {const_cast<float*>(x), LANES * s.rows}, to, panels_of(s.cols), one_thread());
  for (int64_t j = 0; j < s.cols; j += LANES) {
    const int64_t lanes = std::min<int64_t>(LANES, s.cols - j);
    const float* panel = to[j / LANES];
    if (out.col_stride != 1) {
      unpack_panel(panel, s.col + j, lanes, out.transposed());
      continue;
    }
    for (int64_t i = 0; i < out.rows; i++) store_row(out, i, s.col + j, panel + i * LANES, lanes);
  }
}

// In runs of a lane, as products are.
inline float sum_of_row(const float* values, int64_t count) {
  constexpr int64_t LANE_RUN = 16 * V;
  const int64_t whole = count / V * V;
  Vec total{};
  for (int64_t i = 0; i < whole;) {
    Vec run{};
    for (const int64_t end = std::min(whole, i + LANE_RUN); i < end; i += V) run += load(values + i);
    total += run;
  }
  float rest = 0;
  for (int64_t i = whole; i < count; i++) rest += values[i];
  return sum(total) + rest;
}

// There may be many chunks, and their sums are added one after the other.
inline void add_sums(const Gradient& g, int64_t row, int64_t rows) {
  const Factor& factor = *g.factor;
  for (int64_t j = 0; j < factor.columns; j++) {
    if (row == 0) g.sums[j] = 0;
    add_compensated(sum_of_row(factor.data + j * factor.stride, rows), g.sums[j], factor.lost[j]);
  }
}

inline void add_gradient_strip(const Gradient& g, const Strip& s) {
  const Scratch x(panels_of(s.cols) * LANES * s.rows);
  pack(g.x, s.row, s.rows, s.col, s.cols, x);
  add_strip(g.factor->matrix(0, g.out.rows, s.rows), s, x, g.out);
  if (g.rest) add_strip(g.factor->matrix(g.out.rows, g.rest->rows, s.rows), s, x, *g.rest);
  if (g.sums && s.col == 0) add_sums(g, s.row, s.rows);
}

// Threads share the columns of a gradient, so that each sum is made by one, over all rows in order.
inline void add_gradient(const Gradient& g, int64_t row, int64_t rows, const Parallel& parallel) {
  const int64_t panels = panels_of(g.x.cols);
  const int64_t wanted = panels / (STRIPS_PER_THREAD * parallel.threads);
  const int64_t width = std::clamp<int64_t>(wanted, 1, STRIP_PANELS) * LANES;
  parallel(round_up(g.x.cols, width) / width, [&](int64_t strip) {
    const int64_t col = strip * width;
    add_gradient_strip(g, {row, rows, col, std::min(width, g.x.cols - col)});
  });
}

// ---- passes ----------------------------------------------------------------------------------

inline void fusion_backward(const AdapterFusionBackward& b, const Parallel& parallel) {
  const int64_t m = b.dy.rows;
  if (m == 0) return;
  const Backward s{.b = b, .parallel = parallel};
  const BackwardColumns columns(s);
  for (int64_t chunk = 0; chunk < m; chunk += s.chunk) {
    const int64_t rows = std::min(s.chunk, m - chunk);
    by_blocks(columns, rows, parallel, [&](int64_t row, int64_t end, float* block,
                                                const Parallel& inner) {
      backward_block(s, columns, chunk + row, chunk + end, chunk, block, inner);
    });
    const auto add = [&](const Factor& factor, const Matrix& x, const Matrix* out,
                         const Matrix* rest, float* sums) {
      if (out) add_gradient({&factor, x, *out, rest, sums}, chunk, rows, parallel);
    };
    const Matrix d_mix = b.d_mix ? b.d_mix->transposed() : Matrix{};
    add(s.dpre, b.in.x, b.d_down, nullptr, b.d_down_bias);
    add(s.dw, b.in.queries(), b.d_score, nullptr, b.d_score_bias);
    add(s.mixed, b.dy, b.d_mix ? &d_mix : nullptr, b.d_mix_bias, nullptr);
  }
}

}  // namespace PK_ISA

#define PK_CONCAT_(a, b) a##b
#define PK_CONCAT(a, b) PK_CONCAT_(a, b)

const AdapterFusionKernels PK_CONCAT(adapter_fusion_, PK_ISA) = {PK_ISA::fusion_forward,
                                                                 PK_ISA::fusion_backward};

}  // namespace peft_kernels
