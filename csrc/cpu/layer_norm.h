// LayerNorm on lane maps: each pixel over its channels, which of rows of features are the
// features of each item.
//
// A few neighbouring vectors are one unit of work, whose channels stay in the second cache
// level from pass to pass. Sums are taken in one fixed order.
//
// Source: J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace lipfast {

struct LayerNormSpec {
  float epsilon;
  bool centred;        // else the mean stays in x: only the variance is without it
  const float* gamma;  // [channels]; null: 1
  const float* beta;   // [channels]; null: 0
};

struct LayerNormKernels {
  // y = gamma * (x - mean) / sqrt(variance + epsilon) + beta, with the mean and the biased variance of each pixel's
  // channels; without `centred` gamma * x / sqrt(variance + epsilon) + beta. y may be x; halos are neither read nor
  // written.
  void (*forward)(const LaneMap& x, const LaneMap& y, const LayerNormSpec& spec, int threads);
  // Gradients for dy at y, which is zero at dead pixels; dx is added to what it holds where `accumulate`, and may be
  // dy where not. dgamma and dbeta may be null. `partial`, 64-byte aligned, holds backward_floats(x).
  void (*backward)(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const LayerNormSpec& spec, bool accumulate,
                   float* dgamma, float* dbeta, float* partial, int threads);
  int64_t (*backward_floats)(const LaneMap& x);
};

}  // namespace lipfast
