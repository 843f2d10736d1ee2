// Soft prompts among text, built once per instruction set: runs of text are copied whole; only the
// prompts' conversion and their gradient's sums calculate.
#include <cstring>

#include "prompt_lookup.h"
#include "matrix/tile.h"

namespace peft_kernels::PK_ISA {
namespace {

constexpr int64_t UNIT_BYTES = 256 << 10;  // of output at a time, for the threads to share
constexpr int64_t ROW_RUN = 32;            // rows of a gradient that are summed one after the other

int64_t tokens_per_unit(int64_t d, DType dtype) {
  return std::max<int64_t>(1, UNIT_BYTES / std::max<int64_t>(1, d * size_of(dtype)));
}

void copy_tokens(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t bytes,
                 int64_t count) {
  if (to_stride == bytes && from_stride == bytes) bytes *= count, count = 1;
  for (int64_t i = 0; i < count; i++)
    std::memcpy(to + i * to_stride, from + i * from_stride, bytes);
}

// Calls f(b, begin, end) for all rows, some places at a time.
template <class F>
void by_units(const PromptPlaces& places, int64_t tokens, const Parallel& parallel, const F& f) {
  const int64_t total = places.total(), units = (total + tokens - 1) / tokens;
  parallel(places.batch * units, [&](int64_t i) {
    const int64_t begin = i % units * tokens;
    f(i / units, begin, std::min(total, begin + tokens));
  });
}

// ---- forward ---------------------------------------------------------------------------------

void put_soft_token(const PromptForward& f, char* to, int64_t task, int64_t slot) {
  const int64_t bytes = f.d * size_of(f.dtype);
  if (task < 0) return void(std::memset(to, 0, bytes));
  const char* from = f.prompts.at(task, slot);
  if (f.dtype == f.prompt_dtype) return void(std::memcpy(to, from, bytes));
  with_type(f.dtype, to, [&](auto* out) {
    narrow_row(reinterpret_cast<const float*>(from), out, f.d);
  });
}

// Memory of no elements may be null, and nothing is copied to it.
void forward(const PromptForward& f, const Parallel& parallel) {
  if (f.d == 0) return;
  const int64_t bytes = f.d * size_of(f.dtype);
  by_units(f.places, tokens_per_unit(f.d, f.dtype), parallel,
           [&](int64_t b, int64_t begin, int64_t end) {
    const int64_t task = f.task_ids ? f.task_ids[b] : 0;
    f.places.walk(
        b, begin, end,
        [&](int64_t j, int64_t s, int64_t count) {
          copy_tokens(f.out.at(b, j), bytes, f.embeddings.at(b, s), f.embeddings.token_bytes,
                      bytes, count);
        },
        [&](int64_t j, int64_t slot) { put_soft_token(f, f.out.at(b, j), task, slot); });
  });
}

// ---- backward --------------------------------------------------------------------------------

template <class T>
void add_row(const T* from, float* sums, int64_t count) {
  int64_t i = 0;
  for (; i + V <= count; i += V) store(sums + i, load(sums + i) + load(from + i));
  for (; i < count; i++) sums[i] += widen(from[i]);
}

// In runs, as in tile.h.
void sum_soft_token(const PromptBackward& f, int64_t task, int64_t slot) {
  float* total = f.d_prompts + (task * f.places.length + slot) * f.d;
  const int64_t first = f.begin[task], last = f.begin[task + 1];
  const Scratch run(last - first > ROW_RUN ? f.d : 0);
  float* sums = last - first > ROW_RUN ? run : total;
  std::memset(total, 0, f.d * sizeof(float));
  std::memset(sums, 0, f.d * sizeof(float));
  for (int64_t i = first; i < last; i++) {
    char* from = f.d_out.at(f.rows[i], f.places.at(f.rows[i], slot));
    with_type(f.dtype, from, [&](const auto* values) { add_row(values, sums, f.d); });
    const bool ends = (i + 1 - first) % ROW_RUN == 0 || i + 1 == last;
    if (sums != total && ends) end_run(f.d, sums, total);
  }
}

void backward(const PromptBackward& f, const Parallel& parallel) {
  if (f.d == 0) return;
  const int64_t bytes = f.d * size_of(f.dtype);
  if (f.d_embeddings.data)
    by_units(f.places, tokens_per_unit(f.d, f.dtype), parallel,
             [&](int64_t b, int64_t begin, int64_t end) {
      f.places.walk(
          b, begin, end,
          [&](int64_t j, int64_t s, int64_t count) {
            copy_tokens(f.d_embeddings.at(b, s), bytes, f.d_out.at(b, j), f.d_out.token_bytes,
                        bytes, count);
          },
          [](int64_t, int64_t) {});
    });
  if (f.d_prompts)
    parallel(f.prompts * f.places.length, [&](int64_t i) {
      sum_soft_token(f, i / f.places.length, i % f.places.length);
    });
}

}  // namespace
}  // namespace peft_kernels::PK_ISA

#define PK_CONCAT_(a, b) a##b
#define PK_CONCAT(a, b) PK_CONCAT_(a, b)

namespace peft_kernels {

const PromptLookupKernels PK_CONCAT(prompt_lookup_, PK_ISA) = {PK_ISA::forward, PK_ISA::backward};

}  // namespace peft_kernels
