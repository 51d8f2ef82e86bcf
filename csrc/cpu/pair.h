// A convolution and the depthwise one behind it in one pass, in inference: what lies between them never reaches
// memory. Each channel of the second needs that channel of the first alone, so a thread makes some channels of the
// first in memory of its own, with their halo, and the second from them while they are in the cache. Such a map is
// the largest of an inverted residual block, and its halo larger than itself where the map is small.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/norm.h"
#include "cpu/taps.h"

namespace lipfast {

// One of the two, and what follows the sums.
struct PairPart {
  const TapList* sparse;
  const DenseTaps* dense;  // null: sparse. The second is sparse always
  const float* values;     // as the taps want them
  const float* bias;       // null: zero
  ActivationSpec act;
};

struct PairKernels {
  // first, second: the regions of `sheets` sheets. What the first write and the second read lies elsewhere: in planes
  // of the form of `between`, whose halo is filled.
  void (*run)(const Region* first, const Region* second, int64_t sheets, const PairPart& one, const PairPart& two,
              const LaneMap& between, const HaloSpec& halo, const LaneMap& y, const HaloSpec& y_halo, int threads);
};

}  // namespace lipfast
