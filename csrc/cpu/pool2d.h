// Average and maximum pooling on lane maps.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/norm.h"

namespace lipfast {

// Window of kernel x kernel pixels every `stride` pixels, `pad` pixels outside the
// picture; blocks of x are stride times those of y.
struct PoolSpec {
  int64_t kernel, stride, pad;
  bool maximum;  // else the average, whose padding counts as zeros
};

struct PoolKernels {
  // The halo of x reaches pad pixels before and kernel - stride - pad pixels behind a
  // block. It is filled: with zeros for averages; for maxima with kReplicate, which
  // adds only pixels that the window holds anyway (pad <= kernel / 2).
  void (*forward)(const LaneMap& x, const LaneMap& y, const PoolSpec& spec, HaloSpec halo, int threads);
  // The gradient is added to dx. Ties of a maximum go to the first pixel, as in torch.
  void (*backward)(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const PoolSpec& spec, int threads);
  // y (n, c, 1, 1) = the mean over all pixels of each picture of x; y's other lanes become 0.
  void (*mean)(const LaneMap& x, const LaneMap& y, const LivePixelMask& live, int threads);
  // dx += dy / pixels
  void (*mean_backward)(const LaneMap& dy, const LaneMap& dx, int threads);
};

}  // namespace lipfast
