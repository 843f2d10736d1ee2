// Keys and values as panels for the tiles, and the tiles' products.
#pragma once
#include "prefix_attention_rows.h"

namespace peft_kernels::PK_ISA {

// [key / LANES][D][LANES]: lanes are keys. Tokens [first, first + count) go to keys from key on,
// which may lie in the middle of a panel.
template <class T>
void pack_lanes(const T* from, int64_t token, int64_t count, int64_t key, int64_t dim,
                float* panels) {
  for (int64_t done = 0, n; done < count; done += n) {
    const int64_t lane = (key + done) % LANES;
    n = std::min(LANES - lane, count - done);
    float* panel = panels + (key + done - lane) * dim;
    if (lane == 0) {
      if (n < LANES) std::memset(panel, 0, dim * LANES * sizeof(float));
      pack_transposed(from + done * token, token, dim, n, panel);
      continue;
    }
    for (int64_t i = 0; i < n; i++)
      for (int64_t d = 0; d < dim; d++)
        panel[d * LANES + lane + i] = widen(from[(done + i) * token + d]);
  }
}

// [D / LANES][capacity][LANES]: lanes are parts of a key, with zeros after the last.
template <class T>
void pack_rows(const T* from, int64_t token, int64_t count, int64_t key, int64_t dim,
               int64_t capacity, float* panels) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < dim; d += LANES) {
      float* to = panels + d * capacity + (key + i) * LANES;
      const int64_t n = std::min<int64_t>(LANES, dim - d);
      widen_row(from + i * token + d, to, n);
      for (int64_t j = n; j < LANES; j++) to[j] = 0;
    }
}

// The keys or values of a unit, its prefix's first, in one or both forms.
class Panels {
 public:
  Panels(const PrefixAttentionInputs& in, bool lanes, bool rows)
      : capacity_(round_up(in.length + in.keys, LANES)), dim_(in.dim),
        lanes_(lanes ? capacity_ * dim_ : 0), rows_(rows ? capacity_ * round_up(dim_, LANES) : 0),
        has_lanes_(lanes), has_rows_(rows) {}

  void pack(const Heads& from, int64_t row, int64_t head, int64_t token, int64_t count,
            int64_t key) {
    with_type(from.dtype, from.at(row, head, token), [&](auto* data) {
      if (has_lanes_) pack_lanes(data, from.token, count, key, dim_, lanes_);
      if (has_rows_) pack_rows(data, from.token, count, key, dim_, capacity_, rows_);
    });
  }

  // Of the keys from a multiple of LANES on.
  const float* lanes(int64_t key) const { return lanes_ + key * dim_; }
  // Of LANES columns from d on, of the keys from key on.
  const float* rows(int64_t d, int64_t key) const { return rows_ + d * capacity_ + key * LANES; }

 private:
  int64_t capacity_, dim_;
  Scratch lanes_, rows_;
  bool has_lanes_, has_rows_;
};

// The tiles aren't inlined: in a large function the compiler runs out of registers.

// out = a panel, for R rows of a and the LANES columns of a panel.
template <int R>
__attribute__((noinline)) void product_tile(Rows a, int64_t depth, const float* panel, float* out,
                                            int64_t out_row) {
  Vec tile[ROWS][VECS]{};
  accumulate_run<R, true>(depth, a, panel, LANES, tile);
  for (int i = 0; i < R; i++)
    for (int v = 0; v < VECS; v++) store(out + i * out_row + v * V, tile[i][v]);
}

// out = factor out + a b; b has LANES columns, and factor is 1 where there are none.
template <int R, bool UNIT_STEP>
__attribute__((noinline)) void add_product_tile(Rows a, int64_t depth, const float* b,
                                                int64_t b_row, const float* factors, float* out,
                                                int64_t out_row) {
  Vec tile[ROWS][VECS]{};
  accumulate_run<R, UNIT_STEP>(depth, a, b, b_row, tile);
  for (int i = 0; i < R; i++)
    for (int v = 0; v < VECS; v++) {
      float* to = out + i * out_row + v * V;
      const Vec before = factors ? load(to) * factors[i] : load(to);
      store(to, before + tile[i][v]);
    }
}

// scores[i * KEYS + j] = a_i . panel_(key + j), by tiles of which a query sees a key.
inline void multiply_keys(const QueryBlock& block, Rows a, const Panels& panels, int64_t key,
                          int64_t width, float* scores) {
  const int64_t dim = block.unit.in.dim;
  for (int64_t j = 0; j < width; j += LANES)
    for (int64_t i = block.first_tile_that_sees(key + j); i < block.n; i += ROWS)
      with_rows(block.n - i, [&](auto R) {
        product_tile<R>(a.at(i), dim, panels.lanes(key + j), scores + i * KEYS + j, KEYS);
      });
}

// out_i = factor_i out_i + sum over j of weights[i * KEYS + j] panel_(key + j).
inline void add_values(const QueryBlock& block, const float* weights, const Panels& panels,
                       int64_t key, int64_t width, const float* factors, float* out,
                       int64_t out_row) {
  for (int64_t d = 0; d < block.unit.in.dim; d += LANES)
    for (int64_t i = block.first_tile_that_sees(key); i < block.n; i += ROWS) {
      const int64_t depth = std::min(width, block.limits[block.last_of_tile(i)] - key);
      with_rows(block.n - i, [&](auto R) {
        add_product_tile<R, true>({weights + i * KEYS, KEYS, 1}, depth, panels.rows(d, key), LANES,
                                  factors ? factors + i : nullptr, out + i * out_row + d, out_row);
      });
    }
}

}  // namespace peft_kernels::PK_ISA
