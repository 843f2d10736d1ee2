// Which adapter each row has, and where the adapters lie: tensors that are checked, for kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "../common.h"
#include "multi_lora_linear.h"

namespace peft_kernels {
using Tensors = std::vector<Tensor>;

// ---- routing ---------------------------------------------------------------------------------

// Rows by adapter, in the batch's order within each.
struct Routes {
  std::vector<int64_t> rows;
  std::vector<int64_t> begin;  // [slots + 1]
};

inline Routes route(const Tensor& ids, int64_t m, int64_t slots) {
  STD_TORCH_CHECK(ids.is_contiguous() && ids.scalar_type() == ScalarType::Int,
                  "ids must be contiguous int32");
  const int64_t count = ids.numel();
  STD_TORCH_CHECK(m == 0 || (count > 0 && m % count == 0),
                  "ids must serve the rows of x in equal parts");
  const int32_t* id = ids.const_data_ptr<int32_t>();
  const int64_t part = m ? m / count : 0;
  Routes routes{.begin = std::vector<int64_t>(slots + 1)};
  for (int64_t e = 0; e < count; e++) {
    STD_TORCH_CHECK(id[e] >= -1 && id[e] < slots, "ids must be in [-1, ", slots, "); got ", id[e]);
    if (id[e] >= 0) routes.begin[id[e] + 1] += part;
  }
  for (int64_t slot = 0; slot < slots; slot++) routes.begin[slot + 1] += routes.begin[slot];
  routes.rows.resize(routes.begin[slots]);
  std::vector<int64_t> next(routes.begin.begin(), routes.begin.end() - 1);
  for (int64_t e = 0; e < count; e++)
    if (id[e] >= 0)
      for (int64_t i = 0; i < part; i++) routes.rows[next[id[e]]++] = e * part + i;
  return routes;
}

// ---- banks -----------------------------------------------------------------------------------

struct Bank {
  Pages a, b;
  const int32_t* ranks;
  const float* scales;
  const double* dropout_p;  // null for none
  const int64_t* seeds;
  int64_t slots, column, s_column;  // its first column of y, of S
};

struct Banks {
  std::vector<Bank> banks;
  int64_t slots, rank_columns, columns;
};

template <class T>
const T* row_of(const Tensor& tensor, int64_t slots, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == slots && tensor.is_contiguous() &&
                      tensor.scalar_type() == dtype,
                  name, " must be contiguous, [slots] and of its dtype");
  return tensor.const_data_ptr<T>();
}

inline Banks banks_of(const Tensors& a, const Tensors& b, const Tensors& tables,
                      const Tensors& ranks, const Tensors& scales, const Tensors& dropout_p,
                      const Tensors& seeds, int64_t k) {
  const size_t count = a.size();
  STD_TORCH_CHECK(count > 0 && b.size() == count && tables.size() == count &&
                      ranks.size() == count && scales.size() == count,
                  "a, b, tables, ranks and scales must be given for each bank");
  STD_TORCH_CHECK(dropout_p.size() == seeds.size() && (seeds.empty() || seeds.size() == count),
                  "dropout_p and seeds must be given for each bank or for none");
  Banks all{.slots = ranks[0].size(0)};
  for (size_t i = 0; i < count; i++) {
    STD_TORCH_CHECK(a[i].is_contiguous() && b[i].is_contiguous() && a[i].size(0) == b[i].size(0) &&
                        a[i].size(1) == k,
                    "a and b must be contiguous [pages * 8, k] and [pages * 8, n]");
    STD_TORCH_CHECK(tables[i].dim() == 2 && tables[i].is_contiguous() &&
                        tables[i].size(0) == all.slots &&
                        tables[i].scalar_type() == ScalarType::Int,
                    "tables must be contiguous int32 [slots, max_pages]");
    const int64_t max_pages = tables[i].size(1);
    const int32_t* table = tables[i].const_data_ptr<int32_t>();
    const bool drops = !seeds.empty();
    all.banks.push_back(
        {.a = {matrix_of(a[i], "a"), table, max_pages, nullptr},
         .b = {matrix_of(b[i], "b"), table, max_pages, nullptr},
         .ranks = row_of<int32_t>(ranks[i], all.slots, ScalarType::Int, "ranks"),
         .scales = row_of<float>(scales[i], all.slots, ScalarType::Float, "scales"),
         .dropout_p = drops ? row_of<double>(dropout_p[i], all.slots, ScalarType::Double,
                                             "dropout_p")
                            : nullptr,
         .seeds = drops ? row_of<int64_t>(seeds[i], all.slots, ScalarType::Long, "seeds") : nullptr,
         .slots = all.slots,
         .column = all.columns,
         .s_column = all.rank_columns});
    all.columns += b[i].size(1);
    all.rank_columns += PAGE * max_pages;
  }
  return all;
}

// ---- prepared banks --------------------------------------------------------------------------

// Banks that were checked once, in the bytes of a tensor: this, and then as many of Bank. They
// point into the tensors that they were made of.
struct Prepared {
  static constexpr int64_t MARK = 0x736b6e6162;
  int64_t mark, count, slots, rank_columns, columns, depth;
};
static_assert(std::is_trivially_copyable_v<Bank> && alignof(Bank) <= alignof(Prepared));

inline Tensor prepared_of(const Banks& banks, int64_t depth, const Tensor& like) {
  const int64_t count = banks.banks.size(), size = sizeof(Prepared) + count * sizeof(Bank);
  Tensor bytes = torch::stable::new_empty(like, {size}, ScalarType::Byte);
  char* to = static_cast<char*>(bytes.mutable_data_ptr());
  const Prepared head{Prepared::MARK, count, banks.slots, banks.rank_columns, banks.columns, depth};
  std::memcpy(to, &head, sizeof head);
  std::memcpy(to + sizeof head, banks.banks.data(), count * sizeof(Bank));
  return bytes;
}

inline Banks banks_of(const Tensor& prepared, int64_t depth) {
  const int64_t size = prepared.numel();
  const char* from = static_cast<const char*>(prepared.const_data_ptr());
  Prepared head{};
  if (size >= int64_t(sizeof head)) std::memcpy(&head, from, sizeof head);
  STD_TORCH_CHECK(head.mark == Prepared::MARK && prepared.is_contiguous() &&
                      size == int64_t(sizeof head + head.count * sizeof(Bank)),
                  "prepared must be what multi_lora_linear_prepare has made");
  STD_TORCH_CHECK(head.depth == depth, "x must have ", head.depth, " columns; it has ", depth);
  Banks banks{{}, head.slots, head.rank_columns, head.columns};
  banks.banks.resize(head.count);
  std::memcpy(banks.banks.data(), from + sizeof head, head.count * sizeof(Bank));
  return banks;
}

// ---- groups ----------------------------------------------------------------------------------

inline Dropout dropout_of(const Bank& bank, int64_t slot) {
  if (!bank.seeds || bank.dropout_p[slot] == 0) return {};
  const double p = bank.dropout_p[slot];
  const double threshold = std::min(std::nearbyint(p * 4294967296.0), 4294967295.0);
  return {static_cast<uint64_t>(bank.seeds[slot]), static_cast<uint32_t>(threshold),
          static_cast<float>(1.0 / (1.0 - p))};
}

// The adapters of a bank that have rows and a rank. A page that the table sends outside of the
// arena would be read from wherever it lies, so it is looked at first.
inline std::vector<Group> groups_of(const Bank& bank, const Routes& routes, float scale) {
  std::vector<Group> groups;
  for (int64_t slot = 0; slot < bank.slots; slot++) {
    const int64_t rank = bank.ranks[slot], begin = routes.begin[slot], end = routes.begin[slot + 1];
    if (begin == end || rank <= 0) continue;
    STD_TORCH_CHECK(rank <= bank.a.max_pages * PAGE, "ranks has ", rank, " for slot ", slot,
                    ", but its table has room for ", bank.a.max_pages * PAGE);
    for (int64_t page = 0; !bank.a.apart && page * PAGE < rank; page++) {
      const int64_t row = bank.a.row(slot, page);
      STD_TORCH_CHECK(row >= 0 && row + PAGE <= bank.a.data.rows, "table has page ", row / PAGE,
                      " for slot ", slot, ", but there are ", bank.a.data.rows / PAGE);
    }
    groups.push_back({slot, rank, begin, end, bank.scales[slot] * scale, dropout_of(bank, slot)});
  }
  return groups;
}

// ---- adapters that lie apart ------------------------------------------------------------------

// The adapters of one layer, each in tensors of its own, A [r, k] and B [n, r], read in place.
struct Apart {
  std::vector<const void*> a, b;
  std::vector<int32_t> ranks;
  std::vector<float> scales;
};

inline Apart apart_of(const Tensors& a, const Tensors& b, const std::vector<double>& scales,
                      int64_t n, int64_t k) {
  Apart apart{.scales = {scales.begin(), scales.end()}};
  for (size_t i = 0; i < a.size(); i++) {
    const int64_t r = a[i].size(0);
    STD_TORCH_CHECK(a[i].is_contiguous() && a[i].size(1) == k && b[i].is_contiguous() &&
                        b[i].size(0) == n && b[i].size(1) == r,
                    "a and b must be contiguous [r, k] and [n, r] of each adapter");
    STD_TORCH_CHECK(a[i].scalar_type() == a[0].scalar_type() &&
                        b[i].scalar_type() == a[0].scalar_type(),
                    "a and b must have one dtype");
    apart.a.push_back(a[i].const_data_ptr());
    apart.b.push_back(b[i].const_data_ptr());
    apart.ranks.push_back(r);
  }
  return apart;
}

}  // namespace peft_kernels
