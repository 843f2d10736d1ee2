// Bottleneck adapters on the CPU, built once per instruction set; the maths is in ops/adapter.py.
//
// Each thread takes a range of rows, and what is made of a few rows on their way from x to y stays
// in its caches; x, the residual and dy are read where they lie and each output is written once.
#include "adapter.h"

#include <array>
#include <optional>

#include "bottleneck.h"
#include "matrix/sweep.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t FEW_ROWS = 8;  // up to here packing the weights costs more than the products

inline RowStatistics statistics_of(const AdapterInputs& in, const float* data, bool after) {
  const int64_t norms = (in.pre_norm.weight != nullptr) + (in.norm.weight != nullptr);
  const int64_t offset = data && after && in.pre_norm.weight ? 2 : 0;  // no rows, no data
  return {const_cast<float*>(data) + offset, 2 * norms};
}

// ---- forward ---------------------------------------------------------------------------------

struct Forward {
  const AdapterForward& f;
  const AdapterInputs& in = f.in;
  int64_t m = in.x.rows, k = in.x.cols, n = in.up.rows, r = in.down.rows;
  RowStatistics before = statistics_of(in, f.statistics, false);
  RowStatistics after = statistics_of(in, f.statistics, true);

  template <int R>
  PK_INLINE void pre_norm(int64_t row, Rows x, OutRows h) const {
    Vec sums[ROWS]{};
    add_row_sums<R>(x, k, sums);
    set_statistics<R>(x, k, sums, in.pre_norm.eps, before.at(row));
    normalize<R>(x, k, before.at(row), in.pre_norm, h);
  }

  // y = t or LN(t), of rows whose t lies where rows_of_output puts it.
  template <int R>
  PK_INLINE void finish(int64_t row, OutRows t, const Vec (&sums)[ROWS]) const {
    if (in.norm.weight) {
      set_statistics<R>(t, n, sums, in.norm.eps, after.at(row));
      normalize<R>(t, n, after.at(row), in.norm, t);
    }
    store_rows(f.y, row, R, t);
  }

  Rows factors(int64_t row, int64_t rows, float* buffer) const {
    return in.dropout ? dropout_rows(*in.dropout, row, rows, n, buffer) : Rows{};
  }
};

struct ForwardBuffers {
  Scratch x, h, a, residual, factors, t;
  explicit ForwardBuffers(const Forward& f)
      : x(ROWS * f.k), h(ROWS * f.k), a(ROWS * f.r), residual(ROWS * f.n), factors(ROWS * f.n),
        t(ROWS * f.n) {}
};

inline Update update_of(const AdapterInputs& in, int64_t row, int64_t rows, Rows x,
                        float* residual, Rows factors, OutRows t) {
  const int64_t n = in.up.rows;
  return {.bias = in.up_bias,
          .scale = in.scale,
          .x = in.adds_x ? x : Rows{},
          .residual = in.residual ? float_rows(*in.residual, row, rows, 0, n, residual) : Rows{},
          .factors = factors,
          .t = t};
}

inline void forward_rows(const Forward& f, int64_t row, int64_t end, const float* down,
                         const float* up) {
  const ForwardBuffers buffers(f);
  for (; row < end; row += ROWS)
    with_rows(end - row, [&](auto R) {
      const Rows x = float_rows(f.in.x, row, R, 0, f.k, buffers.x);
      const OutRows h{buffers.h, f.k};
      const bool normed = f.in.pre_norm.weight;
      if (normed) f.pre_norm<R>(row, x, h);
      float* z = f.f.z + row * f.r;
      project(normed ? Rows(h) : x, R, f.k, down, f.r, 1, z);
      add_bias(f.in.down_bias, R, f.r, z);
      activate(f.in.activation, z, R * f.r, buffers.a);
      const OutRows t = rows_of_output(f.f.y, row, buffers.t);
      const Rows factors = f.factors(row, R, buffers.factors);
      const Update update = update_of(f.in, row, R, x, buffers.residual, factors, t);
      Vec sums[ROWS]{};
      multiply_rows<R>({buffers.a, f.r, 1}, f.r, up, f.n,
                       [&](int64_t i, int64_t j, Vec u, auto lanes) {
                         sums[i] += update(i, j, u, lanes);
                       });
      f.finish<R>(row, t, sums);
    });
}

// A few rows: the products are dot products with the weights' rows, which are read where they lie.
inline void forward_few(const Forward& f, const Parallel& parallel) {
  const AdapterInputs& in = f.in;
  const Scratch x_buffer(f.m * f.k), h_buffer(f.m * f.k), a(f.m * f.r), u(f.m * f.n);
  const Scratch residual(f.n), factors(f.n);
  const Rows x = float_rows(in.x, 0, f.m, 0, f.k, x_buffer);
  const OutRows h{h_buffer, f.k};
  for (int64_t i = 0; in.pre_norm.weight && i < f.m; i++) f.pre_norm<1>(i, x.at(i), h.at(i));
  const Matrix h_rows{h.data, DType::f32, f.m, f.k, f.k, 1};
  const auto product = [&](const Matrix& rows, const Matrix& weight, float* out) {
    const int64_t c = weight.rows;
    sweep({.x = rows,
           .g = weight.transposed(),
           .h = {weight.data, DType::f32, 0, c, 1, 0},
           .out = {out, DType::f32, f.m, c, c, 1}},
          parallel);
  };
  product(in.pre_norm.weight ? h_rows : in.x, in.down, f.f.z);
  add_bias(in.down_bias, f.m, f.r, f.f.z);
  activate(in.activation, f.f.z, f.m * f.r, a);
  product({a, DType::f32, f.m, f.r, f.r, 1}, in.up, u);
  for (int64_t i = 0; i < f.m; i++) {
    const OutRows t = rows_of_output(f.f.y, i, u + i * f.n);
    const Update update = update_of(in, i, 1, x.at(i), residual, f.factors(i, 1, factors), t);
    Vec sums[ROWS]{};
    by_vectors(f.n, [&](int64_t j, auto lanes) {
      sums[0] += update(0, j, load(u + i * f.n + j, lanes), lanes);
    });
    f.finish<1>(i, t, sums);
  }
}

void adapter_fwd(const AdapterForward& forward, const Parallel& parallel) {
  const Forward f{forward};
  if (f.m == 0) return;
  // With one column t is its own mean, also when the backward computes it again in its order.
  if (f.m <= FEW_ROWS && f.n > 1) return forward_few(f, parallel);
  const Matrix down = f.in.down.transposed(), up = f.in.up.transposed();
  const Scratch down_panels(panel_floats(down)), up_panels(panel_floats(up));
  pack_shared(down, down_panels, parallel);
  pack_shared(up, up_panels, parallel);
  const int64_t tasks = std::clamp<int64_t>(f.m / MIN_TASK_ROWS, 1, parallel.threads);
  parallel(tasks, [&](int64_t task) {
    forward_rows(f, f.m * task / tasks, f.m * (task + 1) / tasks, down_panels, up_panels);
  });
}

// ---- backward --------------------------------------------------------------------------------

constexpr int64_t BLOCK_ROWS = 240;  // at most: sums of few rows are added up one after the other

// The threads' sums for one gradient.
struct PartialSums {
  const Matrix* out;  // null: not wanted
  int64_t tasks;
  int64_t size = out ? out->rows * out->cols : 0;
  Scratch data{tasks * size};

  RowSums of(int64_t task, int64_t rows) const {
    return {out ? data + task * size : nullptr, size, rows};
  }
  // In the order of the tasks, so the same inputs give the same bits.
  void store(const Parallel& parallel) const {
    constexpr int64_t SMALL = 32 * 1024;  // floats that are added before a thread wakes up
    const Parallel here{1, [](int64_t count, void (*run)(void*, int64_t), void* context) {
                          for (int64_t i = 0; i < count; i++) run(context, i);
                        }};
    if (!size) return;
    store_sum({.x = {nullptr, DType::f32, 0, out->cols, 0, 1},
               .o_scale = 1,
               .o = out,
               .r = out->rows},
              tasks, data, tasks * size < SMALL ? here : parallel);
  }
};

// The sums over one block's rows, which are added to the thread's: the rounding error of many rows
// grows with the number of blocks.
struct BlockSums {
  const RowSums& total;
  Scratch buffer{total.size()};
  float* data = total.size() ? static_cast<float*>(buffer) : nullptr;

  explicit BlockSums(const RowSums& sums) : total(sums) {
    if (data) std::memset(data, 0, total.size() * sizeof(float));
  }
  void flush() const {
    if (data) end_run(total.size(), data, total.next());
  }
};

// What one call needs, and the weights as panels: U^T for t, scale U for dz, D for dx.
struct Backward {
  const AdapterBackward& b;
  const AdapterInputs& in = b.in;
  int64_t m = in.x.rows, k = in.x.cols, n = in.up.rows, r = in.down.rows;
  RowStatistics before = statistics_of(in, b.statistics, false);
  RowStatistics after = statistics_of(in, b.statistics, true);
  bool norm = in.norm.weight, pre_norm = in.pre_norm.weight;
  bool needs_dh = b.dx || b.d_pre_norm;
  bool needs_dz = needs_dh || b.d_down;
  bool needs_x = b.d_down || (norm && in.adds_x) || (pre_norm && needs_dh);
  Matrix up_t = in.up.transposed();
  Scratch up_t_panels{norm ? panel_floats(up_t) : 0};
  Scratch up_panels{needs_dz ? panel_floats(in.up) : 0};
  Scratch down_panels{needs_dh ? panel_floats(in.down) : 0};

  void pack(const Parallel& parallel) const {
    if (norm) pack_shared(up_t, up_t_panels, parallel);
    if (needs_dz) pack_shared(in.up, up_panels, parallel);
    for (int64_t q = 0; needs_dz && q < r; q += LANES)
      for (int64_t j = 0; j < n; j++)
        for (int64_t lane = 0; lane < LANES; lane++)
          up_panels[q * n + j * LANES + lane] *= in.scale[j];
    if (needs_dh) pack_shared(in.down, down_panels, parallel);
  }
};

struct BackwardSums {
  std::optional<Matrix> up_t;  // G is summed as [r, n]
  PartialSums down, down_bias, up, up_sum, pre_norm, norm;

  BackwardSums(const AdapterBackward& b, int64_t tasks)
      : up_t(b.up ? std::optional(b.up->transposed()) : std::nullopt),
        down{b.d_down, tasks}, down_bias{b.d_down_bias, tasks}, up{up_t ? &*up_t : nullptr, tasks},
        up_sum{b.up_sum, tasks}, pre_norm{b.d_pre_norm, tasks}, norm{b.d_norm, tasks} {}

  std::array<const PartialSums*, 6> all() const {
    return {&down, &down_bias, &up, &up_sum, &pre_norm, &norm};
  }
};

// What one thread sums up.
struct TaskSums {
  RowSums down, down_bias, up, up_sum, pre_norm, norm;

  TaskSums(const BackwardSums& s, int64_t task, int64_t rows)
      : down(s.down.of(task, rows)), down_bias(s.down_bias.of(task, rows)), up(s.up.of(task, rows)),
        up_sum(s.up_sum.of(task, rows)), pre_norm(s.pre_norm.of(task, rows)),
        norm(s.norm.of(task, rows)) {}

  template <class F>
  void each(F f) {
    for (RowSums* one : {&down, &down_bias, &up, &up_sum, &pre_norm, &norm}) f(*one);
  }
};

// A thread's way through its rows, by blocks of which all that is made stays in its L2.
struct BackwardTask {
  const Backward& p;
  TaskSums& sums;
  int64_t block;
  bool drops = p.in.dropout;
  Scratch x_rows{p.in.x.dtype == DType::f32 ? 0 : block * p.k};
  Scratch h_rows{p.pre_norm ? block * p.k : 0};
  Scratch dt_rows{block * p.n}, factors{drops ? block * p.n : 0};
  Scratch a_rows{block * p.r}, dz_rows{block * p.r};
  Scratch residual{ROWS * p.n}, dy_rows{ROWS * p.n}, dx_rows{ROWS * p.k};
  BlockSums norm_sums{sums.norm}, pre_norm_sums{sums.pre_norm};

  // dt: dy, or dy taken back through the LayerNorm of a t that is computed again.
  Rows grad_of_sum(int64_t row, int64_t rows, Rows x, Rows factor) const {
    if (!p.norm) {
      const Rows dt = float_rows(p.b.dy, row, rows, 0, p.n, dt_rows);
      if (p.b.dt) store_rows(*p.b.dt, row, rows, dt);
      return dt;
    }
    const OutRows dt =
        p.b.dt ? rows_of_output(*p.b.dt, row, dt_rows) : OutRows{dt_rows, p.n};
    for (int64_t i = 0; i < rows; i += ROWS)
      with_rows(rows - i, [&](auto R) {
        const OutRows t = dt.at(i);
        multiply_rows<R>({a_rows + i * p.r, p.r, 1}, p.r, p.up_t_panels, p.n,
                         update_of(p.in, row + i, R, x.at(i), residual, factor.at(i), t));
        const Rows dy = float_rows(p.b.dy, row + i, R, 0, p.n, dy_rows);
        normalize_backward<R>(dy, t, p.n, p.after.at(row + i), p.in.norm.weight, norm_sums.data,
                              {}, t);
      });
    if (p.b.dt) store_rows(*p.b.dt, row, rows, dt);
    return dt;
  }

  // g, in the factors' place.
  Rows grad_of_update(int64_t rows, Rows dt) const {
    if (!drops) return dt;
    const OutRows g{factors, p.n};
    for (int64_t i = 0; i < rows; i++)
      by_vectors(p.n, [&](int64_t j, auto lanes) {
        store(g, i, j, load(Rows(g), i, j, lanes) * load(dt, i, j, lanes), lanes);
      });
    return g;
  }

  // dD and db_d, from dz and h.
  void add_down(int64_t row, int64_t rows, Rows x) const {
    Rows h = x;
    if (p.pre_norm) {
      const OutRows normed{h_rows, p.k};
      for (int64_t i = 0; i < rows; i += ROWS)
        with_rows(rows - i, [&](auto R) {
          normalize<R>(x.at(i), p.k, p.before.at(row + i), p.in.pre_norm, normed.at(i));
        });
      h = normed;
    }
    const Rows dz{dz_rows, 1, p.r};
    add_outer_and_sums(dz, p.r, h, rows, p.k, sums.down.next(), nullptr);
    add_outer_and_sums({}, 0, {dz_rows, p.r, 1}, rows, p.r, nullptr, sums.down_bias.next());
  }

  // dx, and the gradients of the LayerNorm of x.
  void grad_of_x(int64_t row, int64_t rows, Rows x, Rows dt) const {
    for (int64_t i = 0; i < rows; i += ROWS)
      with_rows(rows - i, [&](auto R) {
        const Rows more = p.in.adds_x ? dt.at(i) : Rows{};
        const OutRows dx =
            p.b.dx ? rows_of_output(*p.b.dx, row + i, dx_rows) : OutRows{dx_rows, p.k};
        multiply_rows<R>({dz_rows + i * p.r, p.r, 1}, p.r, p.down_panels, p.k,
                         [&](int64_t a, int64_t j, Vec dh, auto lanes) {
                           if (!p.pre_norm && more.data) dh += load(more, a, j, lanes);
                           store(dx, a, j, dh, lanes);
                         });
        if (p.pre_norm)
          normalize_backward<R>(dx, x.at(i), p.k, p.before.at(row + i), p.in.pre_norm.weight,
                                pre_norm_sums.data, more, p.b.dx ? dx : OutRows{});
        if (p.b.dx) store_rows(*p.b.dx, row + i, R, dx);
      });
  }

  void run(int64_t row, int64_t rows) const {
    const float* z = p.b.z + row * p.r;
    const Rows x = p.needs_x ? float_rows(p.in.x, row, rows, 0, p.k, x_rows) : Rows{};
    const Rows factor =
        drops ? dropout_rows(*p.in.dropout, row, rows, p.n, factors) : Rows{};
    if (p.norm || p.b.up) activate(p.in.activation, z, rows * p.r, a_rows);
    const Rows dt = grad_of_sum(row, rows, x, factor), g = grad_of_update(rows, dt);
    if (p.b.up) {
      const Rows a{a_rows, 1, p.r};
      add_outer_and_sums(a, p.r, g, rows, p.n, sums.up.next(), sums.up_sum.next());
    }
    if (p.needs_dz) {
      project(g, rows, p.n, p.up_panels, p.r, 1, dz_rows);
      activate_backward(p.in.activation, z, rows * p.r, dz_rows);
    }
    if (p.b.d_down) add_down(row, rows, x);
    if (p.needs_dh) grad_of_x(row, rows, x, dt);
    norm_sums.flush(), pre_norm_sums.flush();
    sums.each([&](RowSums& one) { one.end_block(rows); });
  }
};

void adapter_bwd(const AdapterBackward& backward, const Parallel& parallel) {
  const Backward p{backward};
  const int64_t widest = std::max<int64_t>({p.k, p.n, 1});
  const int64_t wanted = std::min(BLOCK_ROWS, BLOCK_FLOATS / widest / ROWS * ROWS);
  const int64_t block = std::max<int64_t>(ROWS, wanted);
  const int64_t affordable = PARTIAL_FLOATS / std::max<int64_t>(p.r * (p.k + p.n), 1);
  const int64_t most = std::min(p.m / MIN_TASK_ROWS, affordable);
  const int64_t tasks = std::clamp<int64_t>(most, 1, parallel.threads);
  const BackwardSums sums(backward, tasks);
  if (p.m) p.pack(parallel);
  parallel(tasks, [&](int64_t task) {
    const int64_t begin = p.m * task / tasks, end = p.m * (task + 1) / tasks;
    TaskSums task_sums(sums, task, end - begin);
    const BackwardTask blocks{p, task_sums, block};
    for (int64_t row = begin; row < end; row += block) blocks.run(row, std::min(block, end - row));
    task_sums.each([](RowSums& one) { one.finish(); });
  });
  for (const PartialSums* sum : sums.all()) sum->store(parallel);
}

}  // namespace PK_ISA

#define PK_CONCAT_(a, b) a##b
#define PK_CONCAT(a, b) PK_CONCAT_(a, b)

const AdapterKernels PK_CONCAT(adapter_, PK_ISA) = {PK_ISA::adapter_fwd, PK_ISA::adapter_bwd};

}  // namespace peft_kernels
