// Runs the decode plan of multi-LoRA linear through the emulation: for tests, called by ctypes.
#include "../cuda/multi_lora_linear.cuh"

namespace {

using namespace peft_kernels::cuda;

constexpr int BUFFERS = 6 + 5 * MAX_BANKS;

struct BankTensors {
  char *a, *b, *table, *ranks, *scales;
  int64_t rows, width, max_pages;
};

struct Call {
  int32_t dtype, adapter_dtype;  // 0 float32, 1 float16, 2 bfloat16
  char *x, *weight, *bias, *y, *s, *ids;
  int64_t m, n, k, x_stride, id_count, slots, has_base, bank_count;
  BankTensors banks[MAX_BANKS];
  int64_t blocks, shared_limit, seed, left_out;
  // Of x, weight, bias, y, s, ids, and each bank's tensors in order: bytes loaded, different bytes
  // loaded, bytes stored, different bytes stored.
  int64_t traffic[BUFFERS][4];
  char error[512];
};

void watch(char* data, int64_t bytes) { simt::buffers.push_back({data, data ? bytes : 0}); }

template <class T, class A>
Params<T, A> params_of(const Call& c) {
  Params<T, A> p{};
  p.x = reinterpret_cast<T*>(c.x), p.weight = reinterpret_cast<T*>(c.weight);
  p.bias = reinterpret_cast<T*>(c.bias), p.y = reinterpret_cast<T*>(c.y);
  p.s = reinterpret_cast<float*>(c.s), p.ids = reinterpret_cast<int32_t*>(c.ids);
  p.m = int(c.m), p.n = int(c.n), p.k = int(c.k), p.slots = int(c.slots);
  p.x_stride = c.x_stride, p.weight_stride = c.k, p.rows_per_id = int(c.m / c.id_count);
  p.has_base = c.has_base, p.bank_count = int(c.bank_count);
  for (int j = 0; j < c.bank_count; j++) {
    const BankTensors& b = c.banks[j];
    p.banks[j].a = reinterpret_cast<A*>(b.a), p.banks[j].b = reinterpret_cast<A*>(b.b);
    p.banks[j].table = reinterpret_cast<int32_t*>(b.table);
    p.banks[j].ranks = reinterpret_cast<int32_t*>(b.ranks);
    p.banks[j].scales = reinterpret_cast<float*>(b.scales);
    p.banks[j].width = int(b.width), p.banks[j].max_pages = int(b.max_pages);
    p.s_columns += p.banks[j].max_pages * PAGE;
  }
  watch(c.x, ((c.m - 1) * c.x_stride + c.k) * sizeof(T)), watch(c.weight, c.n * c.k * sizeof(T));
  watch(c.bias, c.n * sizeof(T)), watch(c.y, c.m * c.n * sizeof(T));
  watch(c.s, c.m * p.s_columns * sizeof(float)), watch(c.ids, c.id_count * 4);
  for (int j = 0; j < c.bank_count; j++) {
    const BankTensors& b = c.banks[j];
    watch(b.a, b.rows * c.k * sizeof(A)), watch(b.b, b.rows * b.width * sizeof(A));
    watch(b.table, c.slots * b.max_pages * 4), watch(b.ranks, c.slots * 4);
    watch(b.scales, c.slots * 4);
  }
  return p;
}

template <class T, class A>
void run(const Call& c) {
  Params<T, A> p = params_of<T, A>(c);
  const Plan chosen = plan(p, c.shared_limit);
  const auto launch = [&](auto kernel) {
    const simt::Options options{uint64_t(c.seed), int(c.left_out)};
    simt::launch(unsigned(c.blocks), THREADS, chosen.shared_bytes, options, [&] { kernel(p); });
  };
  with_kernel<T, A>(p, chosen, launch);
}

template <class T>
void run_with_adapters(const Call& c) {
  c.adapter_dtype == 0 ? run<T, float>(c) : run<T, T>(c);
}

}  // namespace

// Returns 0, or 1 with the reason in call->error.
extern "C" int multi_lora_decode_simt(Call* call) {
  int status = 0;
  try {
    if (call->dtype == 0) run<float, float>(*call);
    else call->dtype == 1 ? run_with_adapters<Half>(*call) : run_with_adapters<BFloat16>(*call);
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
