// Attention with a prefix on the CPU, built once per instruction set; the maths is in
// ops/prefix_attention.py.
//
// A task is a kv head and a few rows of the batch that share a prefix, which is packed once for
// them. Scores exist for QUERIES x KEYS at a time, and only in the tiles where a query sees a key.
#include <optional>

#include "prefix_attention_direct.h"
#include "prefix_attention_packed.h"
#include "matrix/row_sums.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t DIRECT_QUERIES = 8;  // up to here packing takes longer than it saves
constexpr int64_t TASKS_PER_THREAD = 2;

// Task t is kv head t / segments and segment t % segments.
struct Task {
  const PrefixAttentionInputs& in;
  int64_t head;
  const Segment& segment;
  bool has_prefix = segment.prefix >= 0 && in.length > 0;

  Task(const PrefixAttentionInputs& in, int64_t index)
      : in(in), head(index / in.segment_count), segment(in.segments[index % in.segment_count]) {}

  template <class F>
  void by_unit(const F& f) const {
    for (int64_t i = segment.begin; i < segment.end; i++)
      f(Unit(in, in.order[i], head, has_prefix));
  }

  int64_t queries() const {
    return (segment.end - segment.begin) * in.queries * (in.heads / in.kv_heads);
  }

  void pack_prefix(Panels& keys, Panels& values) const {
    if (!has_prefix) return;
    keys.pack(in.prefix_k, segment.prefix, head, 0, in.length, 0);
    values.pack(in.prefix_v, segment.prefix, head, 0, in.length, 0);
  }
};

inline void pack_text(const Unit& unit, int64_t count, Panels& keys, Panels& values) {
  keys.pack(unit.in.k, unit.row, unit.head, unit.start, count, unit.length);
  values.pack(unit.in.v, unit.row, unit.head, unit.start, count, unit.length);
}

// ---- forward ---------------------------------------------------------------------------------

struct ForwardBuffers {
  int64_t row;  // floats of a query
  Scratch q{QUERIES * row}, out{QUERIES * row}, sums{QUERIES * row}, scores{QUERIES * KEYS};
  explicit ForwardBuffers(const PrefixAttentionInputs& in) : row(round_up(in.dim, LANES)) {}
};

inline void attend(const QueryBlock& block, const Panels& keys, const Panels& values,
                   const ForwardBuffers& buffers, OnlineSoftmax& softmax) {
  const Unit& unit = block.unit;
  for (int64_t key = 0; key < block.keys(); key += KEYS) {
    const int64_t width = std::min(KEYS, block.keys() - key);
    multiply_keys(block, {buffers.q, buffers.row, 1}, keys, key, width, buffers.scores);
    for (int64_t i = block.first_tile_that_sees(key); i < block.n; i++) {
      float* scores = buffers.scores + i * KEYS;
      const int64_t n = std::clamp<int64_t>(block.limits[i] - key, 0, width);
      if (unit.in.mask) unit.add_mask(block.first + i, key, n, scores);
      softmax.add(i, scores, n);
      const int64_t depth = block.limits[block.last_of_tile(i / ROWS * ROWS)] - key;
      for (int64_t j = n; j < std::min(width, depth); j++) scores[j] = 0;
    }
    add_values(block, buffers.scores, values, key, width, softmax.factor, buffers.out, buffers.row);
  }
}

inline void finish(const PrefixAttentionForward& f, const QueryBlock& block,
                   const OnlineSoftmax& softmax, float* out, int64_t row) {
  const Unit& unit = block.unit;
  for (int64_t i = 0; i < block.n; i++) {
    const float factor = softmax.total[i] == 0 ? 0.0f : float(1 / softmax.total[i]);
    for (int64_t d = 0; d < row; d++) out[i * row + d] *= factor;
    const int64_t query = block.first + i;
    unit.store_query(f.out, query, out + i * row);
    const int64_t at = (unit.row * f.in.heads + unit.query_head(query)) * f.in.queries;
    f.lse[at + unit.token(query)] = softmax.log_sum(i);
  }
}

// Blocks part, part + parts, ... of a unit's queries, so that each part has some of the last, which
// see the most keys.
inline void forward_task(const PrefixAttentionForward& f, const Task& task, int64_t part,
                         int64_t parts, bool direct) {
  const PrefixAttentionInputs& in = f.in;
  const ForwardBuffers buffers(in);
  std::optional<Panels> keys, values;
  if (!direct) {
    keys.emplace(in, true, false), values.emplace(in, false, true);
    task.pack_prefix(*keys, *values);
  }
  task.by_unit([&](const Unit& unit) {
    if (!direct) pack_text(unit, unit.count, *keys, *values);
    for (int64_t first = part * QUERIES; first < unit.queries; first += parts * QUERIES) {
      const QueryBlock block(unit, first);
      OnlineSoftmax softmax;
      unit.copy_queries(in.q, first, block.n, in.scale * LOG2_E, buffers.q, buffers.row);
      std::memset(buffers.out, 0, block.n * buffers.row * sizeof(float));
      if (direct)
        attend_directly(block, task.segment.prefix, buffers.q, buffers.row, softmax,
                        buffers.scores, buffers.sums, buffers.out);
      else
        attend(block, *keys, *values, buffers, softmax);
      finish(f, block, softmax, buffers.out, buffers.row);
    }
  });
}

void prefix_attention_fwd(const PrefixAttentionForward& f, const Parallel& parallel) {
  const PrefixAttentionInputs& in = f.in;
  const int64_t queries = in.queries * (in.heads / in.kv_heads);
  const int64_t tasks = in.kv_heads * in.segment_count;
  if (queries == 0 || tasks == 0) return;
  const int64_t blocks = round_up(queries, QUERIES) / QUERIES;
  const int64_t wanted = (TASKS_PER_THREAD * parallel.threads + tasks - 1) / tasks;
  const int64_t parts = std::clamp<int64_t>(parallel.threads == 1 ? 1 : wanted, 1, blocks);
  parallel(tasks * parts, [&](int64_t index) {
    forward_task(f, Task(in, index / parts), index % parts, parts, queries <= DIRECT_QUERIES);
  });
}

// ---- backward --------------------------------------------------------------------------------

struct BackwardBuffers {
  int64_t row;  // floats of a query
  Scratch q{QUERIES * row}, dout{QUERIES * row}, dq{QUERIES * row};
  Scratch p{QUERIES * KEYS}, ds{QUERIES * KEYS};
  float lse[QUERIES], delta[QUERIES];  // the lse less its whole part, to base 2
  int32_t lse_whole[QUERIES];

  explicit BackwardBuffers(const PrefixAttentionInputs& in) : row(round_up(in.dim, LANES)) {}

  void load(const PrefixAttentionBackward& b, const QueryBlock& block) {
    const Unit& unit = block.unit;
    const int64_t dim = b.in.dim;
    unit.copy_queries(b.dout, block.first, block.n, 1, dout, row);
    unit.copy_queries(b.out, block.first, block.n, 1, q, row);  // until delta is known
    for (int64_t i = 0; i < block.n; i++) {
      Vec sums{};
      by_vectors(dim, [&](int64_t d, auto lanes) {
        sums += PK_ISA::load(dout + i * row + d, lanes) * PK_ISA::load(q + i * row + d, lanes);
      });
      delta[i] = sum(sums);
      const int64_t query = block.first + i;
      const int64_t at = (unit.row * b.in.heads + unit.query_head(query)) * b.in.queries;
      const float value = b.lse[at + unit.token(query)];
      const double binary = value == -INFINITE ? 0 : value * LOG2_E;  // all scores are -inf then
      const double whole = std::abs(binary) < (1 << 20) ? std::nearbyint(binary) : 0;
      lse_whole[i] = int32_t(whole), lse[i] = float(binary - whole);
    }
    unit.copy_queries(b.in.q, block.first, block.n, b.in.scale * LOG2_E, q, row);
    std::memset(dq, 0, block.n * row * sizeof(float));
  }
};

// Sums by key of a task's prefix and of one row's text, [key][row]; dk is kept as dk / ln(2).
struct KeySums {
  int64_t row, size;
  Scratch k, v;  // the totals
  RowSums dk, dv;

  KeySums(const PrefixAttentionInputs& in, const Task& task, bool wanted)
      : row(round_up(in.dim, LANES)), size(wanted ? (in.length + in.keys) * row : 0), k(size),
        v(size), dk(k, size, task.queries()), dv(v, size, task.queries()) {}

  void end_block(int64_t queries) { dk.end_block(queries), dv.end_block(queries); }
  void finish() { dk.finish(), dv.finish(); }

  // Of the row's text alone, whose first key comes after the prefix's.
  void clear_text(const Unit& unit) const {
    for (const RowSums* one : {&dk, &dv}) one->clear(unit.length * row, unit.count * row);
  }
  void finish_text(const Unit& unit) const {
    for (const RowSums* one : {&dk, &dv}) one->finish(unit.length * row, unit.count * row);
  }
};

struct Backward {
  const PrefixAttentionBackward& b;
  const Task& task;
  const PrefixAttentionInputs& in = b.in;
  bool needs_text = b.dk, needs_prefix = b.d_prefix_k && task.has_prefix;
  Panels keys{in, true, true}, values{in, true, false};
  KeySums sums{in, task, needs_text || needs_prefix};
  BackwardBuffers buffers{in};

  // Keys of a unit that a gradient is wanted of, or that one of the queries depends on.
  int64_t keys_of(const Unit& unit) const {
    return needs_text || b.dq ? unit.keys() : needs_prefix ? unit.length : 0;
  }

  // p and ds of a block of queries and keys; 0 where a query doesn't see a key.
  void differentiate(const QueryBlock& block, int64_t key, int64_t width) {
    const int64_t first = block.first_tile_that_sees(key);
    multiply_keys(block, {buffers.q, buffers.row, 1}, keys, key, width, buffers.p);
    multiply_keys(block, {buffers.dout, buffers.row, 1}, values, key, width, buffers.ds);
    for (int64_t i = first; i < block.n; i++) {
      float *p = buffers.p + i * KEYS, *ds = buffers.ds + i * KEYS;
      const int64_t n = std::clamp<int64_t>(block.limits[i] - key, 0, width);
      if (in.mask) block.unit.add_mask(block.first + i, key, n, p);
      const int64_t whole = pad_vector(p, n, -INFINITE);
      for (int64_t j = 0; j < whole; j += V) {
        const Vec probability = exp2(load(p + j) - buffers.lse[i], buffers.lse_whole[i]);
        store(p + j, probability);
        store(ds + j, probability * (load(ds + j) - buffers.delta[i]));
      }
      std::fill(p + n, p + width, 0.0f);
      std::fill(ds + n, ds + width, 0.0f);
    }
  }

  // dv += p^T dout and dk += ds^T q, of the keys that these are wanted of.
  void add_to_keys(const QueryBlock& block, int64_t key, int64_t width) const {
    const int64_t length = block.unit.length, row = buffers.row;
    const int64_t begin = needs_prefix ? 0 : std::clamp<int64_t>(length - key, 0, width);
    const int64_t end = needs_text ? width : std::clamp<int64_t>(length - key, 0, width);
    for (int64_t j = begin, i = 0; j < end; j += ROWS) {
      while (i < block.n && block.limits[i] <= key + j) i++;
      with_rows(end - j, [&](auto R) {
        const int64_t at = i * KEYS + j, to = (key + j) * row, depth = block.n - i;
        const Rows p{buffers.p + at, 1, KEYS}, ds{buffers.ds + at, 1, KEYS};
        for (int64_t d = 0; d < row; d += LANES) {
          const float *dout = buffers.dout + i * row + d, *q = buffers.q + i * row + d;
          add_product_tile<R, false>(p, depth, dout, row, nullptr, sums.dv.next() + to + d, row);
          add_product_tile<R, false>(ds, depth, q, row, nullptr, sums.dk.next() + to + d, row);
        }
      });
    }
  }

  void add_block(const QueryBlock& block) {
    buffers.load(b, block);
    const int64_t last = std::min(block.keys(), keys_of(block.unit));
    for (int64_t key = 0; key < last; key += KEYS) {
      const int64_t width = std::min(KEYS, last - key);
      differentiate(block, key, width);
      add_to_keys(block, key, width);
      if (b.dq) add_values(block, buffers.ds, keys, key, width, nullptr, buffers.dq, buffers.row);
    }
    sums.end_block(block.n);
    for (int64_t i = 0; b.dq && i < block.n; i++) {
      float* dq = buffers.dq + i * buffers.row;
      for (int64_t d = 0; d < in.dim; d++) dq[d] = float(dq[d] * in.scale);
      block.unit.store_query(*b.dq, block.first + i, dq);
    }
  }

  // The sums of a row's text, and 0 for its padding.
  void store_text(const Unit& unit) {
    sums.finish_text(unit);
    for (int64_t t = 0; t < in.keys; t++) {
      const bool real = t >= unit.start && t < unit.start + unit.count;
      float* dk = real ? sums.k + (unit.length + t - unit.start) * sums.row : buffers.dq;
      float* dv = real ? sums.v + (unit.length + t - unit.start) * sums.row : buffers.dq;
      if (!real) std::memset(buffers.dq, 0, in.dim * sizeof(float));
      for (int64_t d = 0; d < in.dim; d++) dk[d] *= float(LN_2);
      store_token(*b.dk, unit, t, dk);
      store_token(*b.dv, unit, t, dv);
    }
  }

  void store_token(const Heads& out, const Unit& unit, int64_t token, const float* from) const {
    with_type(out.dtype, out.at(unit.row, unit.head, token),
              [&](auto* to) { narrow_row(from, to, in.dim); });
  }

  // The sums of the prefix, [L, D].
  void store_prefix(float* dk, float* dv) {
    sums.finish();
    for (int64_t t = 0; t < in.length; t++)
      for (int64_t d = 0; d < in.dim; d++) {
        dk[t * in.dim + d] = sums.k[t * sums.row + d] * float(LN_2);
        dv[t * in.dim + d] = sums.v[t * sums.row + d];
      }
  }

  void run() {
    task.pack_prefix(keys, values);
    task.by_unit([&](const Unit& unit) {
      pack_text(unit, std::max<int64_t>(keys_of(unit) - unit.length, 0), keys, values);
      if (needs_text) sums.clear_text(unit);
      for (int64_t first = 0; first < unit.queries; first += QUERIES)
        add_block(QueryBlock(unit, first));
      if (needs_text) store_text(unit);
    });
  }
};

// A prefix's gradient: the sums of the tasks whose rows use it, in their order.
inline void add_partial_sums(const PrefixAttentionInputs& in, int64_t prefix, const float* partial,
                             float* out) {
  const int64_t size = in.kv_heads * in.length * in.dim;
  std::memset(out + prefix * size, 0, size * sizeof(float));
  for (int64_t s = 0; s < in.segment_count; s++)
    for (int64_t i = 0; in.segments[s].prefix == prefix && i < size; i++)
      out[prefix * size + i] += partial[s * size + i];
}

void prefix_attention_bwd(const PrefixAttentionBackward& b, const Parallel& parallel) {
  const PrefixAttentionInputs& in = b.in;
  const int64_t size = in.length * in.dim, all = in.segment_count * in.kv_heads * size;
  const Scratch partial_k(b.d_prefix_k ? all : 0), partial_v(b.d_prefix_k ? all : 0);
  parallel(in.kv_heads * in.segment_count, [&](int64_t index) {
    const Task task(in, index);
    Backward backward{b, task};
    backward.run();
    const int64_t at = (index % in.segment_count * in.kv_heads + task.head) * size;
    if (backward.needs_prefix) backward.store_prefix(partial_k + at, partial_v + at);
  });
  if (!b.d_prefix_k || size == 0) return;
  parallel(in.prefixes, [&](int64_t prefix) {
    add_partial_sums(in, prefix, partial_k, b.d_prefix_k);
    add_partial_sums(in, prefix, partial_v, b.d_prefix_v);
  });
}

}  // namespace PK_ISA

#define PK_CONCAT_(a, b) a##b
#define PK_CONCAT(a, b) PK_CONCAT_(a, b)

const PrefixAttentionKernels PK_CONCAT(prefix_attention_, PK_ISA) = {PK_ISA::prefix_attention_fwd,
                                                                     PK_ISA::prefix_attention_bwd};

}  // namespace peft_kernels
