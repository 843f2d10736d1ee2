// Registers prompt_lookup for the CPU key: checks, tensors to pointers, the masks and labels, and
// the build for this processor. A place or a prompt that isn't there is refused before anything is
// read.
#include "prompt_lookup.h"

#include <optional>
#include <tuple>
#include <vector>

#include "../common.h"
#include "matrix/isa.h"

namespace peft_kernels {
namespace {

using Maybe = std::optional<Tensor>;

constexpr int64_t IGNORED = -100;  // the label that losses leave out

const PromptLookupKernels& kernels() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return prompt_lookup_avx512;
    case Isa::avx2: return prompt_lookup_avx2;
#endif
    default: return prompt_lookup_baseline;
  }
}

PromptPlaces places_of(const Tensor& positions, int64_t batch, int64_t total) {
  STD_TORCH_CHECK(positions.is_cpu() && positions.scalar_type() == ScalarType::Int &&
                      positions.dim() == 2 && positions.size(0) == batch,
                  "positions must be int32 [B, L] on the CPU");
  const int64_t length = positions.size(1);
  const PromptPlaces places{positions.const_data_ptr<int32_t>(), positions.stride(0),
                            positions.stride(1), batch, length, total - length};
  STD_TORCH_CHECK(places.seq >= 0, "there must be at least ", length, " places; got ", total);
  const int64_t different = places.row_stride ? batch : std::min<int64_t>(batch, 1);
  for (int64_t b = 0; b < different; b++)
    for (int64_t slot = 0, last = -1; slot < length; last = places.at(b, slot++))
      STD_TORCH_CHECK(places.at(b, slot) > last && places.at(b, slot) < total,
                      "positions must be strictly increasing in [0, ", total, "); got ",
                      places.at(b, slot), " after ", last);
  return places;
}

// Null for none given: every row has prompt 0.
const int32_t* tasks_of(const Maybe& ids, int64_t batch, int64_t prompts) {
  if (!ids) return nullptr;
  STD_TORCH_CHECK(ids->is_cpu() && ids->scalar_type() == ScalarType::Int && ids->dim() == 1 &&
                      ids->size(0) == batch && ids->is_contiguous(),
                  "task_ids must be contiguous int32 [B] on the CPU");
  const int32_t* tasks = ids->const_data_ptr<int32_t>();
  for (int64_t b = 0; b < batch; b++)
    STD_TORCH_CHECK(tasks[b] >= -1 && tasks[b] < prompts, "task_ids must be in [-1, ", prompts,
                    "); got ", tasks[b]);
  return tasks;
}

Tensor with_unit_elements(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tokens tokens_of(const Tensor& tensor, const char* name) {
  const int64_t size = size_of(dtype_of(tensor, name));
  return {static_cast<char*>(tensor.mutable_data_ptr()), tensor.stride(0) * size,
          tensor.stride(1) * size};
}

// ---- masks and labels ------------------------------------------------------------------------

struct Integers {
  const int64_t* data;
  int64_t row_stride, token_stride;

  int64_t at(int64_t b, int64_t s) const { return data[b * row_stride + s * token_stride]; }
};

std::optional<Integers> integers_of(const Maybe& tensor, const PromptPlaces& places,
                                    const char* name) {
  if (!tensor) return std::nullopt;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Long &&
                      tensor->dim() == 2 && tensor->size(0) == places.batch &&
                      tensor->size(1) == places.seq,
                  name, " must be int64 [B, S] on the CPU");
  return Integers{tensor->const_data_ptr<int64_t>(), tensor->stride(0), tensor->stride(1)};
}

struct Rows {
  PromptPlaces places;
  const int32_t* tasks;
  std::optional<Integers> mask, labels;
  int64_t *out_mask, *position_ids, *out_labels;  // labels null without

  void fill(int64_t b) const {
    const int64_t total = places.total(), row = b * total;
    const bool has_prompt = !tasks || tasks[b] >= 0;
    int64_t real = 0;
    const auto put = [&](int64_t j, bool is_real) {
      real += is_real;
      out_mask[row + j] = is_real;
      position_ids[row + j] = real ? real - 1 : 0;
    };
    places.walk(
        b, 0, total,
        [&](int64_t j, int64_t s, int64_t count) {
          for (int64_t i = 0; i < count; i++) put(j + i, !mask || mask->at(b, s + i));
          for (int64_t i = 0; out_labels && i < count; i++)
            out_labels[row + j + i] = labels->at(b, s + i);
        },
        [&](int64_t j, int64_t) {
          put(j, has_prompt);
          if (out_labels) out_labels[row + j] = IGNORED;
        });
  }
};

// ---- the ops ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> prompt_lookup_fwd(Tensor embeddings, Tensor prompts,
                                                             Maybe task_ids, Tensor positions,
                                                             Maybe mask, Maybe labels) {
  STD_TORCH_CHECK(embeddings.dim() == 3, "embeddings must be [B, S, d]");
  const int64_t batch = embeddings.size(0), seq = embeddings.size(1), d = embeddings.size(2);
  const PromptPlaces places = places_of(positions, batch, positions.size(1) + seq);
  const DType dtype = dtype_of(embeddings, "embeddings"), wide = DType::f32;
  STD_TORCH_CHECK(prompts.is_cpu() && prompts.dim() == 3 && prompts.size(2) == d &&
                      prompts.size(1) == places.length && prompts.size(0) > 0,
                  "prompts must be [P, L, d] on the CPU, for positions [B, L]");
  const DType prompt_dtype = dtype_of(prompts, "prompts");
  STD_TORCH_CHECK(prompt_dtype == dtype || prompt_dtype == wide,
                  "prompts must be float32 or have the embeddings' dtype");
  embeddings = with_unit_elements(embeddings), prompts = with_unit_elements(prompts);
  if (task_ids) task_ids = torch::stable::contiguous(*task_ids);
  const int32_t* tasks = tasks_of(task_ids, batch, prompts.size(0));
  const auto integers = [&](bool given) {
    const std::vector<int64_t> shape{batch, places.total()}, none{0};
    return torch::stable::new_empty(embeddings, given ? shape : none, ScalarType::Long);
  };
  Tensor out = torch::stable::new_empty(embeddings, {batch, places.total(), d});
  Tensor out_mask = integers(true), position_ids = integers(true);
  Tensor out_labels = integers(labels.has_value());
  const Rows rows{.places = places,
                  .tasks = tasks,
                  .mask = integers_of(mask, places, "mask"),
                  .labels = integers_of(labels, places, "labels"),
                  .out_mask = out_mask.mutable_data_ptr<int64_t>(),
                  .position_ids = position_ids.mutable_data_ptr<int64_t>(),
                  .out_labels = labels ? out_labels.mutable_data_ptr<int64_t>() : nullptr};
  for (int64_t b = 0; b < batch; b++) rows.fill(b);
  kernels().forward({.places = places,
                     .d = d,
                     .dtype = dtype,
                     .prompt_dtype = prompt_dtype,
                     .embeddings = tokens_of(embeddings, "embeddings"),
                     .prompts = tokens_of(prompts, "prompts"),
                     .out = tokens_of(out, "out"),
                     .task_ids = tasks},
                    torch_threads());
  return {out, out_mask, position_ids, out_labels};
}

std::tuple<Tensor, Tensor> prompt_lookup_bwd(Tensor d_out, Maybe task_ids, Tensor positions,
                                             int64_t prompts, bool needs_embeddings,
                                             bool needs_prompts) {
  STD_TORCH_CHECK(d_out.dim() == 3, "d_out must be [B, L + S, d]");
  const int64_t batch = d_out.size(0), d = d_out.size(2);
  const PromptPlaces places = places_of(positions, batch, d_out.size(1));
  if (task_ids) task_ids = torch::stable::contiguous(*task_ids);
  const int32_t* tasks = tasks_of(task_ids, batch, prompts);
  d_out = with_unit_elements(d_out);
  std::vector<int64_t> rows, begin(prompts + 1), none{0};
  for (int64_t b = 0; b < batch; b++)
    if (const int64_t task = tasks ? tasks[b] : 0; task >= 0) begin[task + 1]++;
  for (int64_t task = 0; task < prompts; task++) begin[task + 1] += begin[task];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  rows.resize(begin.back());
  for (int64_t b = 0; b < batch; b++)
    if (const int64_t task = tasks ? tasks[b] : 0; task >= 0) rows[next[task]++] = b;
  const std::vector<int64_t> text{batch, places.seq, d}, soft{prompts, places.length, d};
  Tensor d_embeddings = torch::stable::new_empty(d_out, needs_embeddings ? text : none);
  Tensor d_prompts =
      torch::stable::new_empty(d_out, needs_prompts ? soft : none, ScalarType::Float);
  kernels().backward(
      {.places = places,
       .d = d,
       .dtype = dtype_of(d_out, "d_out"),
       .d_out = tokens_of(d_out, "d_out"),
       .d_embeddings = needs_embeddings ? tokens_of(d_embeddings, "d_embeddings") : Tokens{},
       .d_prompts = needs_prompts ? d_prompts.mutable_data_ptr<float>() : nullptr,
       .rows = rows.data(),
       .begin = begin.data(),
       .prompts = prompts},
      torch_threads());
  return {d_embeddings, d_prompts};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, library) {
  library.impl("prompt_lookup_fwd", TORCH_BOX(&peft_kernels::prompt_lookup_fwd));
  library.impl("prompt_lookup_bwd", TORCH_BOX(&peft_kernels::prompt_lookup_bwd));
}
