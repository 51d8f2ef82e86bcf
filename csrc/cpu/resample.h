// Changing the size of lane maps: x2 upsampling block by block, and any separable
// selection or interpolation pixel by pixel.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace lipfast {

// One axis of a general resampling: output position i takes
// (1 - weight[i]) * in[first[i]] + weight[i] * in[second[i]].
// first[i] < 0 stands for zero; weight null: selection, `second` is not read.
struct AxisTaps {
  int64_t count;
  const int32_t* first;
  const int32_t* second;
  const float* weight;
};

struct ResampleKernels {
  // x2 maps: blocks of y are twice those of x. Bilinear means align_corners=False
  // and needs the halo of x (one pixel, kReplicate) filled.
  void (*nearest2)(const LaneMap& x, const LaneMap& y, int threads);
  void (*bilinear2)(const LaneMap& x, const LaneMap& y, int threads);
  // Their gradients; bilinear2 needs the halo of dy (one pixel, kReplicate) filled:
  // what the clamped edge weighs twice comes back from there.
  void (*nearest2_backward)(const LaneMap& dy, const LaneMap& dx, bool accumulate, int threads);
  void (*bilinear2_backward)(const LaneMap& dy, const LaneMap& dx, bool accumulate, int threads);
  // Pixel shuffle: r x r pixels in `large`, whose blocks are r times as large, are r * r channels of `many`, one after
  // the other. What is written (`large` or `many`) takes the values, or they are added to it.
  void (*shuffle)(const LaneMap& many, const LaneMap& large, bool to_large, bool accumulate, int threads);
  // Any resampling along both axes: cropping, padding, flipping, other factors,
  // align_corners. Pixel by pixel, so several times slower. Dead pixels of
  // the output are left alone.
  void (*general)(const LaneMap& x, const LaneMap& y, const AxisTaps& rows, const AxisTaps& columns, int threads);
  // Its gradient is added to dx.
  void (*general_backward)(const LaneMap& dy, const LaneMap& dx, const AxisTaps& rows, const AxisTaps& columns,
                           int threads);
};

}  // namespace lipfast
