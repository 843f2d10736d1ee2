// Registers attention with a prefix for the CPU key: tensors to views, the rows by prefix, and the
// build for this processor.
#include "prefix_attention.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "../common.h"
#include "matrix/isa.h"

namespace peft_kernels {
namespace {

using Maybe = std::optional<Tensor>;

// Tasks by which the kv heads and parts of the batch are shared out, at least. They don't depend on
// the number of threads: a prefix's gradient is the sum of its tasks' sums.
constexpr int64_t TASKS = 32;

const PrefixAttentionKernels& kernels() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return prefix_attention_avx512;
    case Isa::avx2: return prefix_attention_avx2;
#endif
    default: return prefix_attention_baseline;
  }
}

Tensor with_unit_last(const Tensor& tensor) {
  return tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Heads heads_of(const Tensor& tensor, const char* name) {
  return {tensor.mutable_data_ptr(), dtype_of(tensor, name), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

void check_shape(const Tensor& tensor, const char* name, std::vector<int64_t> shape) {
  bool right = tensor.is_cpu() && tensor.dim() == int64_t(shape.size());
  for (size_t i = 0; right && i < shape.size(); i++) right = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(right, name, " has the wrong shape or isn't on the CPU");
}

// Contiguous integers by row of the batch, or null.
class RowIntegers {
 public:
  RowIntegers(const Maybe& tensor, int64_t rows, const char* name) {
    if (!tensor) return;
    check_shape(*tensor, name, {rows});
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Int, name, " must be int32");
    held_ = torch::stable::contiguous(*tensor);
    data_ = held_->const_data_ptr<int32_t>();
  }
  const int32_t* data() const { return data_; }

 private:
  Maybe held_;
  const int32_t* data_ = nullptr;
};

AttentionMask mask_of(const Tensor& mask) {
  using Kind = AttentionMask::Kind;
  const bool boolean = mask.scalar_type() == ScalarType::Bool;
  const DType dtype = boolean ? DType::f32 : dtype_of(mask, "mask");
  const Kind kind = boolean               ? Kind::boolean
                    : dtype == DType::f32 ? Kind::f32
                    : dtype == DType::f16 ? Kind::f16
                                          : Kind::bf16;
  return {mask.mutable_data_ptr(), kind, mask.stride(0), mask.stride(1), mask.stride(2),
          mask.stride(3)};
}

// The inputs of both passes, and what holds their memory.
class Inputs {
 public:
  Inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
         const Tensor& prefix_v, const Maybe& prefix_ids, const Maybe& mask, const Maybe& starts,
         const Maybe& ends, bool is_causal, double scale)
      : q_(with_unit_last(q)), k_(with_unit_last(k)), v_(with_unit_last(v)),
        prefix_k_(with_unit_last(prefix_k)), prefix_v_(with_unit_last(prefix_v)),
        starts_(starts, q.size(0), "starts"), ends_(ends, q.size(0), "ends") {
    const int64_t rows = q.size(0), kv_heads = k.size(1), keys = k.size(2), dim = q.size(3);
    const int64_t prefixes = prefix_k.size(0), length = prefix_k.size(2);
    STD_TORCH_CHECK(kv_heads > 0 && q.size(1) % kv_heads == 0, "q's heads must be a multiple of k's");
    check_shape(k, "k", {rows, kv_heads, keys, dim});
    check_shape(v, "v", {rows, kv_heads, keys, dim});
    check_shape(prefix_k, "prefix_k", {prefixes, kv_heads, length, dim});
    check_shape(prefix_v, "prefix_v", {prefixes, kv_heads, length, dim});
    STD_TORCH_CHECK(prefix_ids || prefixes == 1, "a bank of several prefixes needs prefix_ids");
    if (mask) {
      check_shape(*mask, "mask", {rows, q.size(1), q.size(2), keys});
      mask_ = mask_of(*mask);
    }
    set_segments(prefix_ids, rows, prefixes, kv_heads);
    in = {.rows = rows, .heads = q.size(1), .kv_heads = kv_heads, .queries = q.size(2),
          .keys = keys, .dim = dim, .length = length, .prefixes = prefixes,
          .q = heads_of(q_, "q"), .k = heads_of(k_, "k"), .v = heads_of(v_, "v"),
          .prefix_k = heads_of(prefix_k_, "prefix_k"), .prefix_v = heads_of(prefix_v_, "prefix_v"),
          .mask = mask_ ? &*mask_ : nullptr, .starts = starts_.data(), .ends = ends_.data(),
          .is_causal = is_causal, .scale = scale, .order = order_.data(),
          .segments = segments_.data(), .segment_count = int64_t(segments_.size())};
    for (const Heads& other : {in.k, in.v, in.prefix_k, in.prefix_v})
      STD_TORCH_CHECK(other.dtype == in.q.dtype, "k, v and the prefix must have q's dtype");
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  PrefixAttentionInputs in;

 private:
  // The rows by prefix, in parts so small that there are TASKS of them over the heads.
  void set_segments(const Maybe& prefix_ids, int64_t rows, int64_t prefixes, int64_t kv_heads) {
    const RowIntegers ids(prefix_ids, rows, "prefix_ids");
    const auto prefix_of = [&](int64_t row) -> int64_t { return ids.data() ? ids.data()[row] : 0; };
    for (int64_t row = 0; row < rows; row++)
      STD_TORCH_CHECK(prefix_of(row) >= -1 && prefix_of(row) < prefixes,
                      "prefix_ids must be in [-1, ", prefixes - 1, "]; got ", prefix_of(row));
    order_.resize(rows);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return prefix_of(a) < prefix_of(b); });
    const int64_t parts = (TASKS + kv_heads - 1) / kv_heads;
    const int64_t most = std::max<int64_t>(1, (rows + parts - 1) / parts);
    for (int64_t begin = 0, end; begin < rows; begin = end) {
      const int64_t prefix = prefix_of(order_[begin]);
      for (end = begin; end < rows && end < begin + most && prefix_of(order_[end]) == prefix;) end++;
      segments_.push_back({prefix, begin, end});
    }
  }

  Tensor q_, k_, v_, prefix_k_, prefix_v_;
  RowIntegers starts_, ends_;
  std::optional<AttentionMask> mask_;
  std::vector<int64_t> order_;
  std::vector<Segment> segments_;
};

// [B, H, N, D] that lies in memory as [B, N, H, D].
Tensor rows_first(const Tensor& like, int64_t rows, int64_t heads, int64_t tokens, int64_t dim) {
  const Tensor memory = torch::stable::new_empty(like, {rows, tokens, heads, dim});
  return torch::stable::transpose(memory, 1, 2);
}

// An output of the backward: of size 0 where it isn't wanted.
struct HeadsOutput {
  Tensor tensor;
  Heads heads;
  bool needed;

  HeadsOutput(const Tensor& like, bool needed)
      : tensor(needed ? rows_first(like, like.size(0), like.size(1), like.size(2), like.size(3))
                      : torch::stable::new_empty(like, {0})),
        needed(needed) {
    if (needed) heads = heads_of(tensor, "output");
  }
  const Heads* wanted() const { return needed ? &heads : nullptr; }
};

std::tuple<Tensor, Tensor> prefix_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor prefix_k,
                                                Tensor prefix_v, Maybe prefix_ids, Maybe mask,
                                                Maybe starts, Maybe ends, bool is_causal,
                                                double scale) {
  const Inputs inputs(q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, is_causal, scale);
  const PrefixAttentionInputs& in = inputs.in;
  Tensor out = rows_first(q, in.rows, in.heads, in.queries, in.dim);
  Tensor lse = torch::stable::new_empty(q, {in.rows, in.heads, in.queries}, ScalarType::Float);
  kernels().forward({in, heads_of(out, "out"), lse.mutable_data_ptr<float>()}, torch_threads());
  return {out, lse};
}

// Prefixes of several lengths: those of one length together, whose rows are read where they lie.
Tensor prefix_attention_lengths(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v,
                                Tensor prefix_ids, std::vector<int64_t> prefix_lengths, Maybe mask,
                                bool is_causal, double scale) {
  const Inputs inputs(q, k, v, prefix_k, prefix_v, prefix_ids, mask, {}, {}, is_causal, scale);
  PrefixAttentionInputs in = inputs.in;
  STD_TORCH_CHECK(int64_t(prefix_lengths.size()) == in.prefixes,
                  "prefix_lengths must have one entry for each of ", in.prefixes, " prefixes");
  for (int64_t length : prefix_lengths)
    STD_TORCH_CHECK(length >= 0 && length <= in.length, "prefix_lengths must be in [0, ",
                    in.length, "]; got ", length);
  std::map<int64_t, std::vector<Segment>> by_length;
  for (const Segment& one : std::span(in.segments, in.segment_count))
    by_length[one.prefix < 0 ? 0 : prefix_lengths[one.prefix]].push_back(one);
  Tensor out = rows_first(q, in.rows, in.heads, in.queries, in.dim);
  Tensor lse = torch::stable::new_empty(q, {in.rows, in.heads, in.queries}, ScalarType::Float);
  for (const auto& [length, segments] : by_length) {
    in.length = length, in.segments = segments.data(), in.segment_count = segments.size();
    kernels().forward({in, heads_of(out, "out"), lse.mutable_data_ptr<float>()}, torch_threads());
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Maybe prefix_ids,
    Maybe mask, Maybe starts, Maybe ends, Tensor out, Tensor lse, bool is_causal, double scale,
    bool needs_q, bool needs_kv, bool needs_prefix) {
  const Inputs inputs(q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, is_causal, scale);
  const PrefixAttentionInputs& in = inputs.in;
  dout = with_unit_last(dout), out = with_unit_last(out), lse = torch::stable::contiguous(lse);
  check_shape(dout, "dout", {in.rows, in.heads, in.queries, in.dim});
  check_shape(out, "out", {in.rows, in.heads, in.queries, in.dim});
  check_shape(lse, "lse", {in.rows, in.heads, in.queries});
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float, "lse must be float32");
  const HeadsOutput dq(q, needs_q), dk(k, needs_kv), dv(v, needs_kv);
  std::vector<int64_t> shape{0};
  if (needs_prefix) shape = {in.prefixes, in.kv_heads, in.length, in.dim};
  Tensor d_prefix_k = torch::stable::new_empty(q, shape, ScalarType::Float);
  Tensor d_prefix_v = torch::stable::new_empty(q, shape, ScalarType::Float);
  kernels().backward(
      {.in = in,
       .dout = heads_of(dout, "dout"),
       .out = heads_of(out, "out"),
       .lse = lse.const_data_ptr<float>(),
       .dq = dq.wanted(),
       .dk = dk.wanted(),
       .dv = dv.wanted(),
       .d_prefix_k = needs_prefix ? d_prefix_k.mutable_data_ptr<float>() : nullptr,
       .d_prefix_v = needs_prefix ? d_prefix_v.mutable_data_ptr<float>() : nullptr},
      torch_threads());
  return {dq.tensor, dk.tensor, dv.tensor, d_prefix_k, d_prefix_v};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, library) {
  library.impl("prefix_attention_fwd", TORCH_BOX(&peft_kernels::prefix_attention_fwd));
  library.impl("prefix_attention_lengths", TORCH_BOX(&peft_kernels::prefix_attention_lengths));
  library.impl("prefix_attention_bwd", TORCH_BOX(&peft_kernels::prefix_attention_bwd));
}
