// Fetching what comes next, a little at a time, while something else is computed.
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

// Brings a box of vectors of a map into the second cache level. Its lines lie in as
// many pages as there are channels, where no hardware prefetcher finds them.
class Ahead {
 public:
  // Does nothing.
  Ahead() = default;
  // `channels` x `rows` x `cols` vectors in `steps` steps. Strides in floats.
  Ahead(const float* first, int64_t channels, int64_t rows, int64_t cols, int64_t channel_stride, int64_t row_stride,
        int64_t col_stride, int64_t steps)
      : at_(first),
        rows_(rows),
        cols_(cols),
        channel_stride_(channel_stride),
        row_stride_(row_stride),
        col_stride_(col_stride),
        lines_(channels * rows * cols),
        steps_(steps) {}

  void Step() {
    for (due_ += lines_; due_ >= steps_; due_ -= steps_) {
      PrefetchFar(at_ + row_ * row_stride_ + col_ * col_stride_);
      if (++col_ < cols_) continue;
      col_ = 0;
      if (++row_ < rows_) continue;
      row_ = 0;
      at_ += channel_stride_;
    }
  }

 private:
  const float* at_ = nullptr;
  int64_t rows_ = 0, cols_ = 0;
  int64_t channel_stride_ = 0, row_stride_ = 0, col_stride_ = 0;
  int64_t lines_ = 0, steps_ = 1;  // all lines are fetched in so many steps
  int64_t due_ = 0, row_ = 0, col_ = 0;
};

// Out of line: its variables would push the caller's out of their registers.
__attribute__((noinline)) static void StepBoth(Ahead* a, Ahead* b) {
  a->Step();
  b->Step();
}

}  // namespace LIPFAST_NS
}  // namespace lipfast
