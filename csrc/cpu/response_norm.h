// Global response norm: how large each channel is, over the pixels of a picture, beside the mean of its channels.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace lipfast {

struct ResponseNormKernels {
  // y (n, c, 1, 1) = g / (mean over channels of g + epsilon), g being the root of the sum over pixels of x^2; y's other
  // lanes become 0. epsilon > 0.
  void (*forward)(const LaneMap& x, const LaneMap& y, float epsilon, const LivePixelMask& live, int threads);
  // dx takes the gradient, or it is added where `accumulate`; a channel of zeros has none. `partial`, 64-byte aligned,
  // holds a vector for each plane.
  void (*backward)(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, float epsilon, const LivePixelMask& live,
                   bool accumulate, float* partial, int threads);
};

}  // namespace lipfast
