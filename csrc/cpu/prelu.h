// PReLU: the slope below zero is learned, one for each channel or one for all.
//
// Maps of one call agree in batch, channels, sides and blocks; halos may differ and are neither read nor written.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace lipfast {

struct PreluSpec {
  const float* slopes;  // of channel c at [c * step]
  int64_t step;         // 1, or 0: one for all
};

struct PreluKernels {
  // y = x where x > 0, else slope * x. y may be x.
  void (*forward)(const LaneMap& x, const LaneMap& y, const PreluSpec& spec, int threads);
  // dx (null: not wanted) takes the gradient, or it is added where `accumulate`; dx may be dy. dslopes (null: not
  // wanted) as the slopes lie; `partial` holds a float for each plane.
  void (*backward)(const LaneMap& x, const LaneMap& dy, const LaneMap* dx, const PreluSpec& spec,
                   const LivePixelMask& live, bool accumulate, float* dslopes, float* partial, int threads);
};

}  // namespace lipfast
