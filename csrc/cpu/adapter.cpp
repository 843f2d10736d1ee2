// Registers the bottleneck adapter for the CPU key: tensors to matrices, and the build for this
// processor.
#include "adapter.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common.h"
#include "matrix/isa.h"
#include "options.h"

namespace peft_kernels {
namespace {

using Maybe = std::optional<Tensor>;

const AdapterKernels& kernels() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return adapter_avx512;
    case Isa::avx2: return adapter_avx2;
#endif
    default: return adapter_baseline;
  }
}

// A vector of parameters as floats: where it lies, if it holds contiguous ones, or a copy.
class Floats {
 public:
  Floats(const Maybe& tensor, int64_t size, const char* name) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->dim() == 1 && tensor->size(0) == size, name,
                    " must be [", size, "] on the CPU");
    switch (tensor->scalar_type()) {
      case ScalarType::Float: take<float>(*tensor); break;
      case ScalarType::Double: take<double>(*tensor); break;
      case ScalarType::Half: take<torch::headeronly::Half>(*tensor); break;
      case ScalarType::BFloat16: take<torch::headeronly::BFloat16>(*tensor); break;
      default: STD_TORCH_CHECK(false, name, " has a dtype that the native kernel can't read");
    }
  }
  Floats(float value, int64_t size) : copy_(std::max<int64_t>(size, 1), value) {
    data_ = copy_.data();
  }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;

  operator const float*() const { return data_; }

 private:
  template <class T>
  void take(const Tensor& tensor) {
    const T* from = tensor.const_data_ptr<T>();
    const int64_t size = tensor.size(0), stride = tensor.stride(0);
    if constexpr (std::is_same_v<T, float>)
      if (stride == 1 && size) return void(data_ = from);
    copy_.resize(std::max<int64_t>(size, 1));  // never null: that would mean no vector
    for (int64_t i = 0; i < size; i++) copy_[i] = static_cast<float>(from[i * stride]);
    data_ = copy_.data();
  }

  std::vector<float> copy_;
  const float* data_ = nullptr;
};

// The inputs of both passes, and what holds their memory.
class Inputs {
 public:
  Inputs(const Tensor& x, const Maybe& residual, const Tensor& down_weight, const Maybe& down_bias,
         const Tensor& up_weight, const Maybe& up_bias, double scale, const Maybe& scale_t,
         const Maybe& pre_norm_weight, const Maybe& pre_norm_bias, double pre_norm_eps,
         const Maybe& norm_weight, const Maybe& norm_bias, double norm_eps,
         const std::string& activation, bool adds_x, double dropout_p, const Maybe& seed)
      : k(x.size(1)), n(up_weight.size(0)), r(down_weight.size(0)),
        x_(with_unit_stride(x, true)), down_(with_unit_stride(down_weight, true)),
        up_(with_unit_stride(up_weight, true)), dropout_(dropout_of(dropout_p, seed)),
        down_bias_(down_bias, r, "down_bias"), up_bias_(up_bias, n, "up_bias"),
        scale_(scale_t && scale_t->dim() ? Floats(*scale_t, n, "scale_t")
                                         : Floats(scale_of(scale, scale_t), n)),
        pre_norm_weight_(pre_norm_weight, k, "pre_norm_weight"),
        pre_norm_bias_(pre_norm_bias, k, "pre_norm_bias"),
        norm_weight_(norm_weight, n, "norm_weight"), norm_bias_(norm_bias, n, "norm_bias") {
    STD_TORCH_CHECK(down_weight.size(1) == k, "down_weight must be [r, k] for x [m, k]");
    STD_TORCH_CHECK(up_weight.size(1) == r, "up_weight must be [n, r] for down_weight [r, k]");
    STD_TORCH_CHECK(!adds_x || n == k, "x can only be added where n = k");
    if (residual) {
      STD_TORCH_CHECK(residual->size(0) == x.size(0) && residual->size(1) == n,
                      "residual must be [m, n]");
      residual_ = with_unit_stride(*residual, true);
      residual_matrix_ = matrix_of(*residual_, "residual");
    }
    in = {.x = matrix_of(x_, "x"),
          .residual = residual_ ? &*residual_matrix_ : nullptr,
          .down = matrix_of(down_, "down_weight"),
          .up = matrix_of(up_, "up_weight"),
          .down_bias = down_bias_,
          .up_bias = up_bias_,
          .scale = scale_,
          .pre_norm = {pre_norm_weight_, pre_norm_bias_, static_cast<float>(pre_norm_eps)},
          .norm = {norm_weight_, norm_bias_, static_cast<float>(norm_eps)},
          .activation = activation_of(activation),
          .adds_x = adds_x,
          .dropout = dropout_ ? &*dropout_ : nullptr};
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  int64_t statistics() const {
    return 2 * ((in.pre_norm.weight != nullptr) + (in.norm.weight != nullptr));
  }

  int64_t k, n, r;
  AdapterInputs in;

 private:
  Tensor x_, down_, up_;
  Maybe residual_;
  std::optional<Matrix> residual_matrix_;
  std::optional<Dropout> dropout_;
  Floats down_bias_, up_bias_, scale_, pre_norm_weight_, pre_norm_bias_, norm_weight_, norm_bias_;
};

// An output of the backward: of size 0 where it isn't wanted.
struct Output {
  Tensor tensor;
  std::optional<Matrix> matrix;

  Output(const Tensor& like, bool needed, std::vector<int64_t> shape, ScalarType dtype)
      : tensor(torch::stable::new_empty(like, needed ? shape : std::vector<int64_t>{0}, dtype)) {
    if (!needed) return;
    const int64_t rows = shape.size() == 1 ? 1 : shape[0], columns = shape.back();
    const DType type = dtype_of(tensor, "output");
    matrix = Matrix{tensor.mutable_data_ptr(), type, rows, columns, columns, 1};
  }
  const Matrix* wanted() const { return matrix ? &*matrix : nullptr; }
};

const float* floats_of(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float &&
                      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
                  name, " must be contiguous float32 [", rows, ", ", columns, "]");
  return tensor.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor, Tensor> adapter_fwd(
    Tensor x, Maybe residual, Tensor down_weight, Maybe down_bias, Tensor up_weight, Maybe up_bias,
    double scale, Maybe scale_t, Maybe pre_norm_weight, Maybe pre_norm_bias, double pre_norm_eps,
    Maybe norm_weight, Maybe norm_bias, double norm_eps, std::string activation, bool adds_x,
    double dropout_p, Maybe seed) {
  const Inputs inputs(x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
                      pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias,
                      norm_eps, activation, adds_x, dropout_p, seed);
  const int64_t m = x.size(0);
  Tensor y = torch::stable::new_empty(x, {m, inputs.n});
  Tensor z = torch::stable::new_empty(x, {m, inputs.r}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(x, {m, inputs.statistics()}, ScalarType::Float);
  kernels().forward({.in = inputs.in,
                     .y = {y.mutable_data_ptr(), inputs.in.x.dtype, m, inputs.n, inputs.n, 1},
                     .z = z.mutable_data_ptr<float>(),
                     .statistics = statistics.mutable_data_ptr<float>()},
                    torch_threads());
  return {y, z, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_bwd(
    Tensor dy, Tensor x, Maybe residual, Tensor down_weight, Maybe down_bias, Tensor up_weight,
    Maybe up_bias, double scale, Maybe scale_t, Maybe pre_norm_weight, Maybe pre_norm_bias,
    double pre_norm_eps, Maybe norm_weight, Maybe norm_bias, double norm_eps, Tensor z, Tensor statistics,
    std::string activation, bool adds_x, double dropout_p, Maybe seed, bool needs_x,
    bool needs_residual, bool needs_down, bool needs_up, bool needs_pre_norm, bool needs_norm) {
  const Inputs inputs(x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
                      pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias,
                      norm_eps, activation, adds_x, dropout_p, seed);
  const int64_t m = x.size(0), k = inputs.k, n = inputs.n, r = inputs.r;
  STD_TORCH_CHECK(dy.size(0) == m && dy.size(1) == n, "dy must be [m, n]");
  dy = with_unit_stride(dy, true);
  const ScalarType base = x.scalar_type(), wide = ScalarType::Float;
  const Output dx(x, needs_x, {m, k}, base), dt(x, needs_residual, {m, n}, base);
  const Output d_down(x, needs_down, {r, k}, wide), d_down_bias(x, needs_down, {r}, wide);
  const Output up(x, needs_up, {n, r}, wide), up_sum(x, needs_up, {n}, wide);
  const Output d_pre_norm(x, needs_pre_norm && inputs.in.pre_norm.weight, {2, k}, wide);
  const Output d_norm(x, needs_norm && inputs.in.norm.weight, {2, n}, wide);
  kernels().backward({.in = inputs.in,
                      .dy = matrix_of(dy, "dy"),
                      .z = floats_of(z, m, r, "z"),
                      .statistics = floats_of(statistics, m, inputs.statistics(), "statistics"),
                      .dx = dx.wanted(),
                      .dt = dt.wanted(),
                      .d_down = d_down.wanted(),
                      .d_down_bias = d_down_bias.wanted(),
                      .up = up.wanted(),
                      .up_sum = up_sum.wanted(),
                      .d_pre_norm = d_pre_norm.wanted(),
                      .d_norm = d_norm.wanted()},
                     torch_threads());
  return {dx.tensor, dt.tensor, d_down.tensor, d_down_bias.tensor,
          up.tensor, up_sum.tensor, d_pre_norm.tensor, d_norm.tensor};
}

// ---- adapters by row ---------------------------------------------------------------------------

// Which of a batch's parts, of so many rows each, have which adapter; -1: none.
class PartsByAdapter {
 public:
  struct Run {
    int64_t adapter, begin, count;  // in rows, of those that have an adapter
  };

  PartsByAdapter(const Tensor& ids, int64_t rows, int64_t adapters) {
    STD_TORCH_CHECK(ids.is_cpu() && ids.is_contiguous() && ids.scalar_type() == ScalarType::Int,
                    "ids must be contiguous int32 on the CPU");
    const int64_t parts = ids.numel();
    STD_TORCH_CHECK(rows == 0 || (parts && rows % parts == 0),
                    "ids must serve the rows of x in equal parts");
    size_ = parts ? rows / parts : 0;
    const int32_t* id = ids.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < parts; i++) {
      STD_TORCH_CHECK(id[i] >= -1 && id[i] < adapters, "ids must be in [-1, ", adapters, "); got ",
                      id[i]);
      if (id[i] >= 0) order_.push_back(i);
    }
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return id[a] < id[b]; });
    for (size_t i = 0; i < order_.size(); i++) {
      const int64_t adapter = id[order_[i]];
      if (runs_.empty() || runs_.back().adapter != adapter)
        runs_.push_back({adapter, int64_t(i) * size_, 0});
      runs_.back().count += size_;
    }
  }

  const std::vector<Run>& runs() const { return runs_; }
  int64_t rows() const { return order_.size() * size_; }

  // Those of all rows that have an adapter, by adapter: where they lie if that is their order, or
  // copied.
  Tensor own(const Tensor& all) const { return lie_in_order() ? view(all) : gathered(all); }
  Tensor own_output(const Tensor& y) const {
    return lie_in_order() ? view(y) : torch::stable::new_empty(y, {rows(), y.size(1)});
  }
  void put_back(const Tensor& own, const Tensor& y) const {
    if (lie_in_order()) return;
    each(y, own, [](char* to, char* from, int64_t bytes) { std::memcpy(to, from, bytes); });
  }

 private:
  bool lie_in_order() const {
    for (size_t i = 1; i < order_.size(); i++)
      if (order_[i] != order_[i - 1] + 1) return false;
    return true;
  }
  Tensor view(Tensor all) const {
    return torch::stable::narrow(all, 0, order_.empty() ? 0 : order_[0] * size_, rows());
  }
  Tensor gathered(const Tensor& all) const {
    Tensor own = torch::stable::new_empty(all, {rows(), all.size(1)});
    each(all, own, [](char* from, char* to, int64_t bytes) { std::memcpy(to, from, bytes); });
    return own;
  }
  template <class F>
  void each(const Tensor& all, const Tensor& own, F copy) const {
    const Matrix there = matrix_of(all, "rows"), here = matrix_of(own, "rows");
    const int64_t bytes = here.cols * size_of(here.dtype);
    for (size_t i = 0; i < order_.size(); i++)
      for (int64_t j = 0; j < size_; j++)
        copy(there.at(order_[i] * size_ + j, 0), here.at(i * size_ + j, 0), bytes);
  }

  int64_t size_;
  std::vector<int64_t> order_;
  std::vector<Run> runs_;
};

constexpr Parallel ONE_THREAD{1, [](int64_t tasks, void (*task)(void*, int64_t), void* ctx) {
                               for (int64_t i = 0; i < tasks; i++) task(ctx, i);
                             }};

void run_forward(const Inputs& inputs, const Matrix& y, const Parallel& parallel) {
  const auto z = std::make_unique_for_overwrite<float[]>(y.rows * inputs.r);
  const auto statistics = std::make_unique_for_overwrite<float[]>(y.rows * inputs.statistics());
  kernels().forward({.in = inputs.in, .y = y, .z = z.get(), .statistics = statistics.get()},
                    parallel);
}

// Each thread takes whole adapters where none has more than a thread's share of the rows.
void run_all(const std::deque<Inputs>& inputs, const std::vector<Matrix>& outputs, int64_t rows) {
  const Parallel parallel = torch_threads();
  const int64_t count = inputs.size();
  int64_t most = 0;
  for (const Matrix& y : outputs) most = std::max(most, y.rows);
  if (most * parallel.threads <= rows)
    return parallel(count, [&](int64_t i) { run_forward(inputs[i], outputs[i], ONE_THREAD); });
  for (int64_t i = 0; i < count; i++) run_forward(inputs[i], outputs[i], parallel);
}

Tensor adapter_apart(
    Tensor x, Maybe residual, std::vector<Tensor> down_weights, std::vector<Tensor> down_biases,
    std::vector<Tensor> up_weights, std::vector<Tensor> up_biases, std::vector<double> scales,
    std::vector<Maybe> scale_ts, std::vector<std::string> activations, Maybe pre_norm_weight,
    Maybe pre_norm_bias, double pre_norm_eps, Maybe norm_weight, Maybe norm_bias, double norm_eps,
    bool adds_x, Tensor ids) {
  const size_t adapters = down_weights.size();
  STD_TORCH_CHECK(adapters && down_biases.size() == adapters && up_weights.size() == adapters &&
                      up_biases.size() == adapters && scales.size() == adapters &&
                      scale_ts.size() == adapters && activations.size() == adapters,
                  "there must be matrices, biases, a scale and an activation of each adapter");
  const int64_t n = up_weights[0].size(0);
  STD_TORCH_CHECK(!residual || residual->size(0) == x.size(0), "residual must be [m, n]");
  const PartsByAdapter parts(ids, x.size(0), adapters);
  Tensor y = torch::stable::new_empty(x, {x.size(0), n});
  if (parts.rows() < x.size(0)) torch::stable::zero_(y);
  x = parts.own(with_unit_stride(x, true));
  if (residual) residual = parts.own(with_unit_stride(*residual, true));
  Tensor own_y = parts.own_output(y);
  std::deque<Inputs> inputs;
  std::vector<Matrix> outputs;
  for (const auto& run : parts.runs()) {
    const auto rows = [&](Tensor& all) {
      return torch::stable::narrow(all, 0, run.begin, run.count);
    };
    const int64_t i = run.adapter;
    STD_TORCH_CHECK(up_weights[i].size(0) == n, "all up_weights must have as many rows");
    inputs.emplace_back(rows(x), residual ? Maybe(rows(*residual)) : Maybe(), down_weights[i],
                        down_biases[i], up_weights[i], up_biases[i], scales[i], scale_ts[i],
                        pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias,
                        norm_eps, activations[i], adds_x, 0.0, Maybe());
    outputs.push_back(matrix_of(rows(own_y), "y"));
  }
  run_all(inputs, outputs, parts.rows());
  parts.put_back(own_y, y);
  return y;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, library) {
  library.impl("adapter_fwd", TORCH_BOX(&peft_kernels::adapter_fwd));
  library.impl("adapter_apart", TORCH_BOX(&peft_kernels::adapter_apart));
  library.impl("adapter_bwd", TORCH_BOX(&peft_kernels::adapter_bwd));
}
