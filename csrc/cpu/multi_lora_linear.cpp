// Registers multi-LoRA linear for the CPU key: groups the rows by adapter, cuts the work into units
// and runs the build for this processor. Everything depends on the row and its adapter alone.
#include "multi_lora_banks.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "matrix/isa.h"

namespace peft_kernels {
namespace {

constexpr int64_t COLUMN_UNIT = 64;      // columns are divided in multiples of this
constexpr int64_t OUTER_COLUMNS = 256;   // of a gradient: its sums stay in L2 up to rank 512
constexpr int64_t UNITS_PER_THREAD = 4;  // so that threads finish together
constexpr int64_t WIDE_ROWS = 256;       // of 16-bit y held in float32 until they are rounded

const MultiLoRALinearKernels& kernels(Isa isa = chosen_isa()) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512: return multi_lora_linear_avx512;
    case Isa::avx2: return multi_lora_linear_avx2;
#endif
    default: return multi_lora_linear_baseline;
  }
}

// Whether the products of x and the pages are the processor's own of bfloat16.
bool multiplies_in_pairs(const Matrix& x, const Pages& pages) {
  return multiplies_bf16() && x.dtype == DType::bf16 && pages.data.dtype == DType::bf16;
}

// ---- units -----------------------------------------------------------------------------------

struct Units {
  const std::vector<Group>& groups;
  const int64_t* rows;
  std::vector<Unit> units;

  Work work() const {
    return {rows, groups.data(), int64_t(groups.size()), units.data(), int64_t(units.size())};
  }

  // So many rows of a group at a time at most, as evenly as can be; where fewer units than wanted
  // come of that, the size(group) parts of each are divided too, at multiples of step.
  template <class Size>
  void cut(int64_t rows_each, int64_t step, int64_t wanted, Size size) {
    units.reserve(groups.size());
    for (size_t g = 0; g < groups.size(); g++) {
      const int64_t begin = groups[g].begin, count = groups[g].end - begin;
      const int64_t pieces = (count + rows_each - 1) / rows_each;
      for (int64_t i = 0; i < pieces; i++)
        units.push_back({int64_t(g), begin + count * i / pieces, begin + count * (i + 1) / pieces,
                         0, size(groups[g])});
    }
    const int64_t found = units.size();
    if (found && found < wanted) divide((wanted + found - 1) / found, step);
  }

  void divide(int64_t pieces, int64_t step) {
    std::vector<Unit> divided;
    for (const Unit& unit : units) {
      const int64_t steps = (unit.part_end + step - 1) / step, parts = std::min(pieces, steps);
      for (int64_t i = 0; i < parts; i++) {
        Unit piece = unit;
        piece.part_begin = steps * i / parts * step;
        piece.part_end = std::min(unit.part_end, steps * (i + 1) / parts * step);
        divided.push_back(piece);
      }
    }
    units = std::move(divided);
  }

  // Whole groups that want gradients, by columns.
  void cut_outer(const int32_t* out_rows, int64_t columns) {
    for (size_t g = 0; g < groups.size(); g++)
      for (int64_t j = 0; j < columns && out_rows[groups[g].slot] >= 0; j += OUTER_COLUMNS)
        units.push_back({int64_t(g), groups[g].begin, groups[g].end, j,
                         std::min(columns, j + OUTER_COLUMNS)});
  }
};

int64_t pages_of(const Group& group) { return (group.rank + PAGE - 1) / PAGE; }

Matrix columns_of(const Matrix& m, int64_t first, int64_t count) {
  return {m.at(0, first), m.dtype, m.rows, count, m.row_stride, m.col_stride};
}

Matrix rows_of(const Matrix& m, int64_t first, int64_t count) {
  return {m.at(first, 0), m.dtype, count, m.cols, m.row_stride, m.col_stride};
}

// ---- passes ----------------------------------------------------------------------------------

// One call: the routes of its rows, and what it runs on.
struct Call {
  const Banks& banks;
  const Routes& routes;
  std::vector<std::vector<Group>> groups;  // of each bank
  Parallel parallel;

  Call(const Banks& of_banks, const Routes& of_rows, float scale = 1)
      : banks(of_banks), routes(of_rows), parallel(torch_threads()) {
    groups.reserve(count());
    for (const Bank& bank : banks.banks) groups.push_back(groups_of(bank, routes, scale));
  }

  int64_t count() const { return banks.banks.size(); }

  Units units_of(int64_t bank) const { return {groups[bank], routes.rows.data(), {}}; }

  // Of each bank, for all threads together.
  int64_t wanted() const {
    return parallel.threads > 1 ? UNITS_PER_THREAD * parallel.threads / count() : 1;
  }

  // S = dropout(x) A^T, or dS = scale dy B: x [m, columns] or the bank's columns of it.
  void shrink(const Matrix& x, bool from_y, FloatRows s) const {
    const Shrinks of = shrinks_of(x, from_y, s);
    kernels(of.isa).shrink(of.of_banks.data(), count(), parallel);
  }

  // dx += dropout'(dS A): banks add to one and the same dx, one after the other.
  void expand_to_x(FloatRows s, const Matrix& dx) const {
    const Expands of = expands_of(s, true, dx);
    for (const Expand& one : of.of_banks) kernels().expand(&one, 1, parallel);
  }

  // S, and y += scale S B^T.
  void update(const Matrix& x, FloatRows s, const Matrix& y) const {
    const Shrinks first = shrinks_of(x, false, s);
    const Expands second = expands_of(s, false, y);
    kernels(first.isa).update(first.of_banks.data(), second.of_banks.data(), count(), parallel);
  }

  struct Shrinks {
    std::vector<Units> units;
    std::vector<Shrink> of_banks;
    Isa isa = chosen_isa();
  };

  Shrinks shrinks_of(const Matrix& x, bool from_y, FloatRows s) const {
    Shrinks found;
    found.units.reserve(count()), found.of_banks.reserve(count());
    for (int64_t i = 0; i < count(); i++) {
      const Bank& bank = banks.banks[i];
      const Pages& pages = from_y ? bank.b : bank.a;
      Units& units = found.units.emplace_back(units_of(i));
      units.cut(SHRINK_ROWS, 1, wanted(), pages_of);
      found.of_banks.push_back({.work = units.work(),
                                .x = from_y ? columns_of(x, bank.column, pages.data.cols) : x,
                                .pages = pages,
                                .scaled = from_y,
                                .masked = !from_y,
                                .in_pairs = multiplies_in_pairs(x, pages),
                                .s = {s.data + bank.s_column, s.stride}});
      if (found.of_banks[i].in_pairs) found.isa = widest_isa();
    }
    return found;
  }

  struct Expands {
    std::vector<Units> units;
    std::vector<Expand> of_banks;
  };

  Expands expands_of(FloatRows s, bool to_x, const Matrix& y) const {
    Expands found;
    found.units.reserve(count()), found.of_banks.reserve(count());
    for (int64_t i = 0; i < count(); i++) {
      const Bank& bank = banks.banks[i];
      Units& units = found.units.emplace_back(units_of(i));
      units.cut(EXPAND_ROWS, COLUMN_UNIT, wanted(),
                [&](const Group&) { return (to_x ? bank.a : bank.b).data.cols; });
      found.of_banks.push_back(expand_of(units, bank, s, to_x, y));
    }
    return found;
  }

  // y += scale S B^T, or dx += dropout'(dS A).
  Expand expand_of(const Units& units, const Bank& bank, FloatRows s, bool to_x,
                   const Matrix& y, int64_t first_row = 0) const {
    return {.work = units.work(),
            .s = {s.data + bank.s_column, s.stride},
            .pages = to_x ? bank.a : bank.b,
            .scaled = !to_x,
            .masked = to_x,
            .y = y,
            .column = to_x ? 0 : bank.column,
            .first_row = first_row};
  }

  // out = x g + bias, then the low-rank part. Each element is rounded once, so 16-bit rows are held
  // in float32 between the two.
  void base_and_expand(const Matrix& x, const Matrix& g, const Matrix* bias, FloatRows s, bool to_x,
                       const Matrix& out) const {
    std::vector<Units> units;
    for (int64_t i = 0; i < count(); i++) units.push_back(units_of(i));
    const auto run = [&](const Matrix& some_x, const Matrix& y, int64_t first_row) {
      std::vector<Expand> expands;
      for (size_t i = 0; i < units.size(); i++)
        expands.push_back(expand_of(units[i], banks.banks[i], s, to_x, y, first_row));
      kernels().base({some_x, g, bias, y, expands.data(), int64_t(expands.size())}, parallel);
    };
    if (out.dtype == DType::f32) return run(x, out, 0);
    const int64_t width = out.cols, block = std::min(out.rows, WIDE_ROWS);
    const auto wide = std::make_unique_for_overwrite<float[]>(block * width);
    for (int64_t row = 0; row < out.rows; row += block) {
      const int64_t rows = std::min(block, out.rows - row);
      run(rows_of(x, row, rows), {wide.get(), DType::f32, rows, width, width, 1}, row);
      kernels().narrow({wide.get(), width}, rows_of(out, row, rows), parallel);
    }
  }

  // dA = dS^T dropout(x), or dB^T = scale S^T dy, of the trained adapters.
  void outer(int64_t index, FloatRows s, const Matrix& x, bool from_y, const Tensor& rows,
             Tensor& out) const {
    const Bank& bank = banks.banks[index];
    const int32_t* out_rows = row_of<int32_t>(rows, bank.slots, ScalarType::Int, "grad_rows");
    Units units = units_of(index);
    for (const Group& group : units.groups)
      STD_TORCH_CHECK(out_rows[group.slot] < 0 || out_rows[group.slot] + group.rank <= out.size(0),
                      "grad_rows has row ", out_rows[group.slot], " for a rank of ", group.rank,
                      ", but grad_sizes has ", out.size(0));
    units.cut_outer(out_rows, out.size(1));
    kernels().outer({.work = units.work(),
                     .s = {s.data + bank.s_column, s.stride},
                     .x = from_y ? columns_of(x, bank.column, out.size(1)) : x,
                     .scaled = from_y,
                     .masked = !from_y,
                     .out_rows = out_rows,
                     .out = matrix_of(out, "gradient")},
                    parallel);
  }
};

Tensor zeros(const Tensor& like, int64_t rows, int64_t cols, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, {rows, cols}, dtype);
  return torch::stable::zero_(out);
}

FloatRows float_rows_of(const Tensor& s) {
  STD_TORCH_CHECK(s.is_contiguous() && s.scalar_type() == ScalarType::Float, "s must be float32");
  return {s.mutable_data_ptr<float>(), s.size(1)};
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, const std::optional<Tensor>& bias,
                                   const Banks& banks, const Routes& routes) {
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "weight must be [n, k] for x [m, k]");
  const int64_t m = x.size(0), n = weight.size(0);
  STD_TORCH_CHECK(banks.columns == n, "the banks' widths must add up to n");
  x = with_unit_stride(x, true), weight = with_unit_stride(weight, false);
  Tensor y = torch::stable::new_empty(x, {m, n});
  Tensor s = zeros(x, m, banks.rank_columns, ScalarType::Float);
  std::optional<Matrix> bias_row;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias must be [n]");
    bias_row = Matrix{bias->mutable_data_ptr(), dtype_of(*bias, "bias"), 1, n, n, bias->stride(0)};
  }
  const Call call(banks, routes);
  const Matrix rows = matrix_of(x, "x");
  call.shrink(rows, false, float_rows_of(s));
  call.base_and_expand(rows, matrix_of(weight, "weight").transposed(),
                       bias_row ? &*bias_row : nullptr, float_rows_of(s), false,
                       matrix_of(y, "y"));
  return {y, s};
}

std::tuple<Tensor, Tensor> multi_lora_linear_fwd(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensors a, Tensors b, Tensors tables,
    Tensors ranks, Tensors scales, Tensor ids, std::optional<Tensor>, std::optional<Tensor>,
    Tensors dropout_p, Tensors seeds, std::string) {
  const Banks banks = banks_of(a, b, tables, ranks, scales, dropout_p, seeds, x.size(1));
  return forward(x, weight, bias, banks, route(ids, x.size(0), banks.slots));
}

Tensor multi_lora_linear_apart(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensors a,
                               Tensors b, std::vector<double> scales, Tensor ids) {
  const int64_t n = weight.size(0), k = x.size(1), slots = a.size();
  STD_TORCH_CHECK(slots > 0 && b.size() == a.size() && scales.size() == a.size(),
                  "a, b and scales must be given for each adapter");
  const Routes routes = route(ids, x.size(0), slots);
  const Apart apart = apart_of(a, b, scales, n, k);
  const int64_t most = *std::max_element(apart.ranks.begin(), apart.ranks.end());
  const int64_t max_pages = (most + PAGE - 1) / PAGE;
  const DType dtype = dtype_of(a[0], "a");
  const Matrix any_a{nullptr, dtype, 0, k, k, 1}, any_b{nullptr, dtype, 0, n, 1, 0};
  Banks banks{.slots = slots, .rank_columns = PAGE * max_pages, .columns = n};
  banks.banks.push_back({.a = {any_a, nullptr, max_pages, apart.a.data()},
                         .b = {any_b, nullptr, max_pages, apart.b.data(), true},
                         .ranks = apart.ranks.data(),
                         .scales = apart.scales.data(),
                         .slots = slots});
  return std::get<0>(forward(x, weight, bias, banks, routes));
}

Tensor multi_lora_linear_add(Tensor y, Tensor x, Tensors a, Tensors b, Tensors tables,
                             Tensors ranks, Tensors scales, Tensor ids, std::optional<Tensor>,
                             std::optional<Tensor>, Tensors dropout_p, Tensors seeds, std::string) {
  const Banks banks = banks_of(a, b, tables, ranks, scales, dropout_p, seeds, x.size(1));
  STD_TORCH_CHECK(y.is_contiguous() && y.size(0) == x.size(0) && y.size(1) == banks.columns,
                  "y must be contiguous [m, n], where n is what the banks' widths add up to");
  const Routes routes = route(ids, x.size(0), banks.slots);
  x = with_unit_stride(x, true);
  Tensor s = zeros(x, x.size(0), banks.rank_columns, ScalarType::Float);
  const Call call(banks, routes);
  call.update(matrix_of(x, "x"), float_rows_of(s), matrix_of(y, "y"));
  return s;
}

Tensor multi_lora_linear_prepare(Tensors a, Tensors b, Tensors tables, Tensors ranks,
                                 Tensors scales) {
  STD_TORCH_CHECK(!a.empty(), "a, b, tables, ranks and scales must be given for each bank");
  const int64_t depth = a[0].size(1);
  return prepared_of(banks_of(a, b, tables, ranks, scales, {}, {}, depth), depth, a[0]);
}

void multi_lora_linear_add_prepared(Tensor y, Tensor x, Tensor prepared, Tensor ids, double scale) {
  const int64_t m = x.size(0);
  const Banks banks = banks_of(prepared, x.size(1));
  const Matrix out = matrix_of(y, "y");
  STD_TORCH_CHECK(out.rows == m && out.cols == banks.columns && out.col_stride == 1,
                  "y must be [m, n], its rows contiguous, for n that the banks' widths add up to");
  const Routes routes = route(ids, m, banks.slots);
  if (routes.rows.empty()) return;
  x = with_unit_stride(x, true);
  // What isn't written of it isn't read.
  const auto s = std::make_unique_for_overwrite<float[]>(m * banks.rank_columns);
  const Call call(banks, routes, scale);
  call.update(matrix_of(x, "x"), {s.get(), banks.rank_columns}, out);
}

std::tuple<Tensor, Tensors, Tensors> multi_lora_linear_bwd(
    Tensor dy, Tensor x, std::optional<Tensor> weight, Tensors a, Tensors b, Tensors tables,
    Tensors ranks, Tensors scales, Tensor ids, std::optional<Tensor>, std::optional<Tensor>,
    Tensor s, Tensors dropout_p, Tensors seeds, Tensors grad_rows, std::vector<int64_t> grad_sizes,
    bool needs_x, std::string) {
  const Banks banks = banks_of(a, b, tables, ranks, scales, dropout_p, seeds, x.size(1));
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.size(1) == banks.columns, "dy must be [m, n]");
  STD_TORCH_CHECK(s.size(0) == x.size(0) && s.size(1) == banks.rank_columns, "s must be [m, R]");
  STD_TORCH_CHECK(grad_rows.size() == grad_sizes.size() &&
                      (grad_rows.empty() || grad_rows.size() == a.size()),
                  "grad_rows and grad_sizes must be given for each bank or for none");
  const int64_t m = x.size(0);
  const Routes routes = route(ids, m, banks.slots);
  x = with_unit_stride(x, true), dy = with_unit_stride(dy, true);
  const auto ds_buffer = std::make_unique_for_overwrite<float[]>(m * banks.rank_columns);
  const FloatRows ds{ds_buffer.get(), banks.rank_columns};
  const Call call(banks, routes);
  const Matrix dy_rows = matrix_of(dy, "dy"), x_rows = matrix_of(x, "x");
  call.shrink(dy_rows, true, ds);
  Tensors da, db;
  for (size_t i = 0; i < grad_rows.size(); i++) {
    da.push_back(zeros(a[i], grad_sizes[i], a[i].size(1), a[i].scalar_type()));
    db.push_back(zeros(b[i], grad_sizes[i], b[i].size(1), b[i].scalar_type()));
    call.outer(i, ds, x_rows, false, grad_rows[i], da[i]);
    call.outer(i, float_rows_of(s), dy_rows, true, grad_rows[i], db[i]);
  }
  if (!needs_x) return {torch::stable::new_empty(x, {0}), da, db};
  if (!weight) {
    Tensor dx = zeros(x, m, x.size(1), x.scalar_type());
    call.expand_to_x(ds, matrix_of(dx, "dx"));
    return {dx, da, db};
  }
  const Tensor w = with_unit_stride(*weight, false);
  Tensor dx = torch::stable::new_empty(x, {m, x.size(1)});
  call.base_and_expand(dy_rows, matrix_of(w, "weight"), nullptr, ds, true, matrix_of(dx, "dx"));
  return {dx, da, db};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, library) {
  library.impl("multi_lora_linear_fwd", TORCH_BOX(&peft_kernels::multi_lora_linear_fwd));
  library.impl("multi_lora_linear_apart", TORCH_BOX(&peft_kernels::multi_lora_linear_apart));
  library.impl("multi_lora_linear_add", TORCH_BOX(&peft_kernels::multi_lora_linear_add));
  library.impl("multi_lora_linear_prepare", TORCH_BOX(&peft_kernels::multi_lora_linear_prepare));
  library.impl("multi_lora_linear_add_prepared",
               TORCH_BOX(&peft_kernels::multi_lora_linear_add_prepared));
  library.impl("multi_lora_linear_bwd", TORCH_BOX(&peft_kernels::multi_lora_linear_bwd));
}
