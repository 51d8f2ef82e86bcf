// One number for each pixel, made from its channels: maps of one channel, and the way back.
//
// Maps of one call agree in batch, sides and blocks; halos may differ and are neither read nor written. Dead pixels get
// values as any other pixel does.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace lipfast {

struct ChannelKernels {
  // y = scale * sum over channels of a * b, y being of one channel; added to what it holds where `accumulate`.
  // b null: of a.
  void (*dot)(const LaneMap& a, const LaneMap* b, float scale, const LaneMap& y, bool accumulate, int threads);
  // y = the largest of the channels; NaN if one is.
  void (*largest)(const LaneMap& x, const LaneMap& y, int threads);
  // dx takes the gradient, or it is added where `accumulate`. Equal maxima share it where `shared`; else the first has
  // it.
  void (*largest_backward)(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, bool shared, bool accumulate,
                           int threads);
};

}  // namespace lipfast
