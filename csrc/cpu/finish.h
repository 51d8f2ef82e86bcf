// What inference does behind a convolution, in one pass over its result: BatchNorm
// with running statistics, a residual sum, an activation, and the halo of what is
// written.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/norm.h"
#include "cpu/pointwise.h"

namespace lipfast {

// A BatchNorm's numbers, all [channels]; mean null: no BatchNorm.
struct NormNumbers {
  const float* gamma;  // null: 1
  const float* beta;   // null: 0
  const float* mean;
  const float* variance;
  float epsilon;
};

struct FinishKernels {
  // y = act(gamma * (x - mean) / sqrt(variance + epsilon) + beta + residual).
  // residual may be null. Maps agree in batch, channels, sides and blocks; y may be x.
  void (*finish)(const LaneMap& x, const LaneMap* residual, const LaneMap& y, const NormNumbers& norm,
                 ActivationSpec act, HaloSpec halo, int threads);
};

}  // namespace lipfast
