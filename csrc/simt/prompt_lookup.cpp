// Runs prompt_lookup's kernels through the emulation: for tests, called by ctypes.
#include "../cuda/prompt_lookup.cuh"

namespace {

using namespace peft_kernels::cuda;

constexpr int BUFFERS = 10;

struct Call {
  int32_t dtype, prompt_dtype;  // 0 float32, 1 float16, 2 bfloat16
  int64_t backward;
  // Backward, embeddings and prompts are the gradients that it writes, out the one that it reads.
  char *embeddings, *prompts, *task_ids, *positions, *mask, *labels;
  char *out, *out_mask, *position_ids, *out_labels;
  int64_t batch, seq, length, d, prompt_count;
  int64_t row_stride, token_stride;  // of what is read: embeddings, or out
  int64_t position_stride, seed, left_out;
  int64_t vector;  // elements that the chosen kernel moves at once
  // Of each buffer: bytes loaded, different bytes loaded, bytes stored, different bytes stored.
  int64_t traffic[BUFFERS][4];
  char error[512];
};

void watch(char* data, int64_t bytes) { simt::buffers.push_back({data, data ? bytes : 0}); }

PromptPlaces places_of(const Call& c) {
  return {reinterpret_cast<int32_t*>(c.positions), c.position_stride, 1, int(c.batch),
          int(c.length), int(c.seq)};
}

// What is read may have rows apart; what is written is contiguous.
void watch_all(const Call& c, int64_t size, int64_t prompt_size) {
  const int64_t total = c.length + c.seq, read = c.backward ? total : c.seq;
  const int64_t apart = (c.batch - 1) * c.row_stride + (read - 1) * c.token_stride + c.d;
  const int64_t text = c.batch * c.seq * c.d, whole = c.batch * total * c.d;
  watch(c.embeddings, (c.backward ? text : apart) * size);
  watch(c.prompts, c.prompt_count * c.length * c.d * prompt_size);
  watch(c.task_ids, c.batch * 4);
  watch(c.positions, ((c.batch - 1) * c.position_stride + c.length) * 4);
  watch(c.mask, c.batch * c.seq * 8), watch(c.labels, c.batch * c.seq * 8);
  watch(c.out, (c.backward ? apart : whole) * size);
  for (char* integers : {c.out_mask, c.position_ids, c.out_labels})
    watch(integers, c.batch * total * 8);
}

struct Launch {
  Call& call;

  template <class P>
  void operator()(void (*kernel)(P), const P& p, int64_t blocks, int64_t shared) const {
    const simt::Options options{uint64_t(call.seed), int(call.left_out)};
    simt::launch(unsigned(blocks), LOOKUP_THREADS, shared, options, [&] { kernel(p); });
  }
};

template <class T, class A>
void forward(Call& c) {
  const int64_t d = c.d, total = c.length + c.seq;
  const auto integers = [&](char* data) {
    return Integers{reinterpret_cast<int64_t*>(data), c.seq, 1};
  };
  const PromptForward<T, A> p{
      .places = places_of(c),
      .d = int(d),
      .prompts = int(c.prompt_count),
      .embeddings = {reinterpret_cast<T*>(c.embeddings), c.row_stride, c.token_stride},
      .table = {reinterpret_cast<A*>(c.prompts), c.length * d, d},
      .task_ids = reinterpret_cast<int32_t*>(c.task_ids),
      .mask = integers(c.mask),
      .labels = integers(c.labels),
      .out = {reinterpret_cast<T*>(c.out), total * d, d},
      .out_mask = reinterpret_cast<int64_t*>(c.out_mask),
      .position_ids = reinterpret_cast<int64_t*>(c.position_ids),
      .out_labels = reinterpret_cast<int64_t*>(c.out_labels)};
  watch_all(c, sizeof(T), sizeof(A));
  with_forward(p, [&](auto kernel, int64_t blocks, int64_t shared) {
    c.vector = kernel == prompt_lookup_fwd<1, T, A> ? 1 : 16 / sizeof(T);
    Launch{c}(kernel, p, blocks, shared);
  });
}

template <class T>
void backward(Call& c) {
  const PromptBackward<T> p{
      .places = places_of(c),
      .d = int(c.d),
      .prompts = int(c.prompt_count),
      .d_out = {reinterpret_cast<T*>(c.out), c.row_stride, c.token_stride},
      .task_ids = reinterpret_cast<int32_t*>(c.task_ids),
      .d_embeddings = {reinterpret_cast<T*>(c.embeddings), c.seq * c.d, c.d},
      .d_prompts = reinterpret_cast<float*>(c.prompts)};
  watch_all(c, sizeof(T), sizeof(float));
  with_backward(p, [&](auto kernel, int64_t blocks, int64_t shared) {
    c.vector = kernel == prompt_lookup_bwd<1, T> ? 1 : 16 / sizeof(T);
    Launch{c}(kernel, p, blocks, shared);
  });
}

template <class T>
void run(Call& c) {
  if (c.backward) backward<T>(c);
  else c.prompt_dtype == 0 ? forward<T, float>(c) : forward<T, T>(c);
}

}  // namespace

// Returns 0, or 1 with the reason in call->error.
extern "C" int prompt_lookup_simt(Call* call) {
  int status = 0;
  try {
    if (call->dtype == 0) run<float>(*call);
    else call->dtype == 1 ? run<Half>(*call) : run<BFloat16>(*call);
  } catch (const std::exception& error) {
    std::strncpy(call->error, error.what(), sizeof call->error - 1);
    status = 1;
  }
  for (size_t i = 0; i < simt::buffers.size(); i++) {
    const simt::Buffer& buffer = simt::buffers[i];
    const int64_t row[] = {buffer.loaded, buffer.distinct(1), buffer.stored, buffer.distinct(2)};
    std::memcpy(call->traffic[i], row, sizeof row);
  }
  simt::buffers.clear();
  return status;
}
