// Soft prompts among text: what crosses from the torch side into the kernels.
#pragma once
#include <algorithm>
#include <cstdint>

#include "matrix/matrix.h"

namespace peft_kernels {

// Where the soft tokens stand. Row b's are strictly increasing places among length + seq.
struct PromptPlaces {
  const int32_t* positions;
  int64_t row_stride, slot_stride;
  int64_t batch, length, seq;

  PK_INLINE int64_t total() const { return length + seq; }
  PK_INLINE int64_t at(int64_t b, int64_t slot) const {
    return positions[b * row_stride + slot * slot_stride];
  }

  // Calls text(j, s, count) for runs of places [j, j + count) that hold text from token s on, and
  // prompt(j, slot) for soft tokens, in order, for the places [begin, end) of row b.
  template <class Text, class Prompt>
  PK_INLINE void walk(int64_t b, int64_t begin, int64_t end, const Text& text,
                      const Prompt& prompt) const {
    int64_t slot = 0;
    for (int64_t last = length; slot < last;) {  // the first slot at begin or behind it
      const int64_t middle = (slot + last) / 2;
      if (at(b, middle) < begin) slot = middle + 1;
      else last = middle;
    }
    for (int64_t j = begin; j < end; slot++) {
      const int64_t place = slot < length ? std::min(at(b, slot), end) : end;
      if (j < place) text(j, j - slot, place - j);
      if (place < end) prompt(place, slot);
      j = place + 1;
    }
  }
};

// Tokens [batch, tokens] of d elements each, which are contiguous.
struct Tokens {
  char* data;
  int64_t row_bytes, token_bytes;

  PK_INLINE char* at(int64_t b, int64_t token) const {
    return data + b * row_bytes + token * token_bytes;
  }
};

struct PromptForward {
  PromptPlaces places;
  int64_t d;
  DType dtype, prompt_dtype;  // the same, or float32 prompts
  Tokens embeddings, prompts, out;
  const int32_t* task_ids;  // [batch], -1 for none; null: all 0
};

struct PromptBackward {
  PromptPlaces places;
  int64_t d;
  DType dtype;
  Tokens d_out;
  Tokens d_embeddings;   // its data null where it isn't wanted
  float* d_prompts;      // [prompts, length, d], null where it isn't wanted
  const int64_t* rows;   // by task, in the batch's order within each
  const int64_t* begin;  // [prompts + 1] into rows
  int64_t prompts;
};

struct PromptLookupKernels {
  void (*forward)(const PromptForward&, const Parallel&);
  void (*backward)(const PromptBackward&, const Parallel&);
};

extern const PromptLookupKernels prompt_lookup_baseline;
extern const PromptLookupKernels prompt_lookup_avx2;
extern const PromptLookupKernels prompt_lookup_avx512;

}  // namespace peft_kernels
