// Average and maximum pooling on lane maps.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/norm.h"

namespace lipfast {

// Window of kernel x kernel pixels every `stride` pixels, `pad` pixels outside the
// picture; blocks of x are stride times those of y. The last window may reach farther out.
struct PoolSpec {
  int64_t kernel, stride, pad;
  int64_t counted;  // an average counts so many pixels beyond the picture, as zeros: `pad` or none
  bool maximum;     // else the average
};

// How many pixels of a window along one axis an average counts.
static inline int64_t CountedPixels(int64_t window, int64_t side, const PoolSpec& spec) {
  const int64_t first = window * spec.stride - spec.pad, last = first + spec.kernel;
  const int64_t end = side + spec.counted;
  return (last < end ? last : end) - (first > -spec.counted ? first : -spec.counted);
}

struct PoolKernels {
  // The halo of x reaches pad pixels before and kernel - stride - pad pixels behind a
  // block. It is filled: with zeros for averages; for maxima with kReplicate, as far as
  // windows reach, which adds only pixels that the window holds anyway (pad <= kernel / 2).
  void (*forward)(const LaneMap& x, const LaneMap& y, const PoolSpec& spec, HaloSpec halo, int threads);
  // The gradient is added to dx. Ties of a maximum go to the first pixel, as in torch.
  void (*backward)(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const PoolSpec& spec, int threads);
  // y (n, c, 1, 1) = the mean over all pixels of each picture of x; y's other lanes become 0.
  void (*mean)(const LaneMap& x, const LaneMap& y, const LivePixelMask& live, int threads);
  // dx += dy / pixels
  void (*mean_backward)(const LaneMap& dy, const LaneMap& dx, int threads);
  // Averages of windows that cover x, of any sides: of n pixels to m, window i takes those from i * n / m, rounded
  // down, to (i + 1) * n / m, rounded up. Pixel by pixel; dead pixels of y are left alone.
  void (*mean_to)(const LaneMap& x, const LaneMap& y, int threads);
  // The gradient is added to dx.
  void (*mean_to_backward)(const LaneMap& dy, const LaneMap& dx, int threads);
};

}  // namespace lipfast
