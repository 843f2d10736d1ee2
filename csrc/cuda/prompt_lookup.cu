// Registers prompt_lookup's CUDA kernels: checks, tensors to pointers, and one launch a pass.
// Nothing here waits for the GPU, so that a CUDA graph can hold it; what the ids and the positions
// are, only the kernels see.
#include "prompt_lookup.cuh"

#include <optional>
#include <tuple>
#include <vector>

#include "launch.h"

namespace peft_kernels {
namespace {

using Maybe = std::optional<Tensor>;

constexpr const char* OP = "prompt_lookup";

int int_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size < int64_t(1) << 30, OP, ": ", name, " = ", size, " is too large");
  return static_cast<int>(size);
}

// ---- checks ----------------------------------------------------------------------------------

void check(const Tensor& tensor, const Tensor& like, ScalarType dtype, std::vector<int64_t> shape,
           const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on the embeddings' device");
  bool fits = tensor.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); i++) fits = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(fits, name, " has the wrong shape");
}

Tensor with_unit_elements(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

cuda::PromptPlaces places_of(const Tensor& positions, const Tensor& like, int64_t total) {
  STD_TORCH_CHECK(positions.dim() == 2, "positions must be [B, L]");
  const int64_t batch = like.size(0), length = positions.size(1);
  check(positions, like, ScalarType::Int, {batch, length}, "positions");
  STD_TORCH_CHECK(length <= total, "there must be at least ", length, " places; got ", total);
  return {positions.const_data_ptr<int32_t>(), positions.stride(0), positions.stride(1),
          int_size(batch, "B"), int_size(length, "L"), int_size(total - length, "S")};
}

const int32_t* tasks_of(const Maybe& ids, const Tensor& like) {
  if (!ids) return nullptr;
  check(*ids, like, ScalarType::Int, {like.size(0)}, "task_ids");
  return ids->const_data_ptr<int32_t>();
}

cuda::Integers integers_of(const Maybe& tensor, const Tensor& like, int64_t seq, const char* name) {
  if (!tensor) return {};
  check(*tensor, like, ScalarType::Long, {like.size(0), seq}, name);
  return {tensor->const_data_ptr<int64_t>(), tensor->stride(0), tensor->stride(1)};
}

// The strides of a dimension of size 1 mean nothing; they are set to what keeps vectors whole.
template <class T>
cuda::Tokens<T> tokens_of(const Tensor& tensor) {
  const int64_t token = tensor.size(1) <= 1 ? tensor.size(2) : tensor.stride(1);
  const int64_t row = tensor.size(0) <= 1 ? token * tensor.size(1) : tensor.stride(0);
  return {static_cast<T*>(tensor.mutable_data_ptr()), row, token};
}

// ---- launches --------------------------------------------------------------------------------

template <class P>
void launch(void (*kernel)(P), P p, int64_t blocks, int64_t shared, int device) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, OP, ": ", blocks, " blocks are too many");
  void* arguments[] = {&p};
  check_cuda(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                              dim3(cuda::LOOKUP_THREADS), arguments, static_cast<size_t>(shared),
                              current_stream(device)),
             OP, "cudaLaunchKernel");
}

struct Forward {
  Tensor embeddings, prompts;
  Maybe task_ids;
  Tensor positions;
  Maybe mask, labels;
  Tensor out, out_mask, position_ids, out_labels;

  template <class T, class A>
  void run() const {
    const int64_t seq = embeddings.size(1);
    cuda::PromptForward<T, A> p{
        .places = places_of(positions, embeddings, positions.size(1) + seq),
        .d = int_size(embeddings.size(2), "d"),
        .prompts = int_size(prompts.size(0), "P"),
        .embeddings = tokens_of<const T>(embeddings),
        .table = tokens_of<const A>(prompts),
        .task_ids = tasks_of(task_ids, embeddings),
        .mask = integers_of(mask, embeddings, seq, "mask"),
        .labels = integers_of(labels, embeddings, seq, "labels"),
        .out = tokens_of<T>(out),
        .out_mask = out_mask.mutable_data_ptr<int64_t>(),
        .position_ids = position_ids.mutable_data_ptr<int64_t>(),
        .out_labels = labels ? out_labels.mutable_data_ptr<int64_t>() : nullptr};
    const int device = embeddings.get_device_index();
    const CurrentDevice current(device, OP);
    cuda::with_forward(p, [&](auto kernel, int64_t blocks, int64_t shared) {
      launch(kernel, p, blocks, shared, device);
    });
  }

  template <class T>
  void run_with_prompts() const {
    prompts.scalar_type() == ScalarType::Float ? run<T, float>() : run<T, T>();
  }
};

template <class T>
void run_backward(const Tensor& d_out, const Maybe& task_ids, const cuda::PromptPlaces& places,
                  int64_t prompts, const Tensor* d_embeddings, const Tensor* d_prompts) {
  cuda::PromptBackward<T> p{
      .places = places,
      .d = int_size(d_out.size(2), "d"),
      .prompts = int_size(prompts, "P"),
      .d_out = tokens_of<const T>(d_out),
      .task_ids = tasks_of(task_ids, d_out),
      .d_embeddings = d_embeddings ? tokens_of<T>(*d_embeddings) : cuda::Tokens<T>{},
      .d_prompts = d_prompts ? d_prompts->mutable_data_ptr<float>() : nullptr};
  const int device = d_out.get_device_index();
  const CurrentDevice current(device, OP);
  cuda::with_backward(p, [&](auto kernel, int64_t blocks, int64_t shared) {
    launch(kernel, p, blocks, shared, device);
  });
}

// ---- the ops ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> prompt_lookup_fwd(Tensor embeddings, Tensor prompts,
                                                             Maybe task_ids, Tensor positions,
                                                             Maybe mask, Maybe labels) {
  STD_TORCH_CHECK(embeddings.dim() == 3 && prompts.dim() == 3 && positions.dim() == 2,
                  "embeddings, prompts and positions must be [B, S, d], [P, L, d] and [B, L]");
  const int64_t batch = embeddings.size(0), d = embeddings.size(2), length = positions.size(1);
  const int64_t total = length + embeddings.size(1);
  const ScalarType base = embeddings.scalar_type(), wide = ScalarType::Float;
  check(prompts, embeddings, prompts.scalar_type() == wide ? wide : base,
        {prompts.size(0), length, d}, "prompts");
  const auto integers = [&](bool given) {
    const std::vector<int64_t> shape{batch, total}, none{0};
    return torch::stable::new_empty(embeddings, given ? shape : none, ScalarType::Long);
  };
  if (task_ids) task_ids = torch::stable::contiguous(*task_ids);
  const Forward call{.embeddings = with_unit_elements(embeddings),
                     .prompts = with_unit_elements(prompts),
                     .task_ids = task_ids,
                     .positions = positions,
                     .mask = mask,
                     .labels = labels,
                     .out = torch::stable::new_empty(embeddings, {batch, total, d}),
                     .out_mask = integers(true),
                     .position_ids = integers(true),
                     .out_labels = integers(labels.has_value())};
  switch (dtype_of(embeddings, "embeddings")) {
    case DType::f32: call.run<float, float>(); break;
    case DType::f16: call.run_with_prompts<cuda::Half>(); break;
    case DType::bf16: call.run_with_prompts<cuda::BFloat16>(); break;
  }
  return {call.out, call.out_mask, call.position_ids, call.out_labels};
}

std::tuple<Tensor, Tensor> prompt_lookup_bwd(Tensor d_out, Maybe task_ids, Tensor positions,
                                             int64_t prompts, bool needs_embeddings,
                                             bool needs_prompts) {
  STD_TORCH_CHECK(d_out.dim() == 3 && positions.dim() == 2,
                  "d_out and positions must be [B, L + S, d] and [B, L]");
  const cuda::PromptPlaces places = places_of(positions, d_out, d_out.size(1));
  const int64_t d = d_out.size(2);
  const std::vector<int64_t> text{d_out.size(0), places.seq, d}, soft{prompts, places.length, d};
  const std::vector<int64_t> none{0};
  d_out = with_unit_elements(d_out);
  if (task_ids) task_ids = torch::stable::contiguous(*task_ids);
  Tensor d_embeddings = torch::stable::new_empty(d_out, needs_embeddings ? text : none);
  Tensor d_prompts =
      torch::stable::new_empty(d_out, needs_prompts ? soft : none, ScalarType::Float);
  const auto run = [&](auto f) {
    f(d_out, task_ids, places, prompts, needs_embeddings ? &d_embeddings : nullptr,
      needs_prompts ? &d_prompts : nullptr);
  };
  switch (dtype_of(d_out, "d_out")) {
    case DType::f32: run(run_backward<float>); break;
    case DType::f16: run(run_backward<cuda::Half>); break;
    case DType::bf16: run(run_backward<cuda::BFloat16>); break;
  }
  return {d_embeddings, d_prompts};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, PK_KEY, library) {
  library.impl(PK_NAME("prompt_lookup_fwd"), TORCH_BOX(&peft_kernels::prompt_lookup_fwd));
  library.impl(PK_NAME("prompt_lookup_bwd"), TORCH_BOX(&peft_kernels::prompt_lookup_bwd));
}
