// The border of an input gradient: what a convolution that pads with copied pixels owes to them.
//
// The forward pass reads padding, so pixels beyond the picture have gradients, which belong to the
// pixels that were copied there. There are few of them: a strip along each side. In lanes a strip
// along the top lies in four of sixteen, so each strip is worked out in lanes of its own,
//
//      x ->                        lane l holds the l-th sixteenth of the strip;
//    +----+----+----+-   -+----+   rows are as in the picture, left and right
//    | 0  | 1  | 2  | ... | 15 |   strips are turned by 90 degrees
//    +----+----+----+-   -+----+
//
// by the kernels that run everything else: the gradients that it reads are gathered into such a
// strip, and the result is added to the pixels that padding copies.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/conv.h"
#include "cpu/lanes.h"
#include "cpu/pass.h"

namespace lipfast {

// Where a packed weight stands in the layer; channels of the whole layer, groups unfolded. They come
// by output channel, input channel and place.
struct Weight {
  int32_t out, in;
  int32_t place;  // kernel row * kernel columns + kernel column
};

// Where a place of the kernel reads, in pixels from a position.
struct Reading {
  int32_t place;
  int16_t row, col;
};

// Pixels of one side of the output.
int64_t OutSide(int64_t side, int64_t pad, int64_t kernel, const ConvShape& shape);

// What an input gradient at pixels stride * i + phase reads of dy relative to i, ascending by row and column.
std::vector<Reading> GradientReadings(const ConvShape& shape, int64_t phase_row, int64_t phase_col);

// The taps of each input channel, in the order of `readings`.
std::vector<std::vector<Tap>> GradientTaps(const ConvShape& shape, const std::vector<Weight>& weights,
                                           const std::vector<Reading>& readings);

class Border {
 public:
  // Nothing to do where padding is zeros or there is none. dense: which of the direct kernels.
  Border(const ConvShape& shape, const ConvGeometry& geometry, const std::vector<Weight>& weights, bool dense);
  ~Border();

  int64_t scratch_floats() const;  // 64-byte aligned

  // Adds the border's part to dx, whose pixels hold the rest. dy's halo is not read.
  void AddTo(const float* values, const LaneMap& dy, const LaneMap& dx, float* scratch, int threads) const;

 private:
  class Strip;
  int64_t pictures_;
  std::vector<std::unique_ptr<Strip>> strips_;  // for each side and phase of the stride
};

}  // namespace lipfast
