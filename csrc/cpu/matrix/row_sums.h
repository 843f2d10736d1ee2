// A gradient's sums over a thread's rows, block by block.
#pragma once
#include "tile.h"

namespace peft_kernels::PK_ISA {

constexpr int64_t SUM_ROWS = 512;  // whose sums are added to those of the rows before at once

// total += more, with what the total's last place has lost so far (Kahan's compensated sum).
PK_INLINE void add_compensated(float more, float& total, float& lost) {
  const float before = total;
  more -= lost;
  total = before + more;
  lost = (total - before) - more;
}

// The sums of SUM_ROWS rows are taken on their own first. They are added to the total with what its
// last place lost, so that the rounding error doesn't grow with the number of rows.
class RowSums {
 public:
  // Into total, which may be null for none.
  RowSums(float* total, int64_t size, int64_t rows)
      : total_(total), size_(total ? size : 0), apart_(total && rows > SUM_ROWS),
        recent_(apart_ ? size : 0), lost_(apart_ ? size : 0) {
    clear(0, size_);
    if (apart_) std::memset(recent_, 0, size_ * sizeof(float));
  }
  int64_t size() const { return size_; }
  // What the next block is added to.
  float* next() const { return apart_ ? static_cast<float*>(recent_) : total_; }
  void end_block(int64_t rows) {
    rows_ += rows;
    if (rows_ >= SUM_ROWS) finish();
  }
  void finish() {
    if (rows_) finish(0, size_);
    rows_ = 0;
  }
  // The totals of a part alone.
  void finish(int64_t first, int64_t count) const {
    if (!apart_) return;
    for (int64_t i = first; i < first + count; i++) {
      add_compensated(recent_[i], total_[i], lost_[i]);
      recent_[i] = 0;
    }
  }
  // A part begins again.
  void clear(int64_t first, int64_t count) const {
    if (size_) std::memset(total_ + first, 0, count * sizeof(float));
    if (apart_) std::memset(lost_ + first, 0, count * sizeof(float));
  }

 private:
  float* total_;
  int64_t size_, rows_ = 0;
  bool apart_;
  Scratch recent_, lost_;
};

}  // namespace peft_kernels::PK_ISA
