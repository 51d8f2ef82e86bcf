// GroupNorm on lane maps, fused with the activation behind it and the halo of what it
// writes. With as many groups as channels it is InstanceNorm.
//
// A group of one sheet is one unit of work, so sums are taken in one fixed order.
//
// Source: Y. Wu and K. He, "Group Normalization", ECCV 2018.
#pragma once

#include <cstdint>

#include "cpu/norm.h"

namespace lipfast {

struct GroupNormSpec {
  int64_t groups;  // equal ranges of channels
  float epsilon;
  ActivationSpec act;
  LivePixelMask live;
};

struct GroupNormState {
  const float* gamma;  // [channels]; null: 1
  const float* beta;   // [channels]; null: 0
  // [sheets][groups][16], for the backward pass: in each lane the number of its picture.
  float* mean;
  float* inverse_deviation;
};

struct GroupNormKernels {
  // y = act(gamma * (x - mean) / sqrt(variance + epsilon) + beta), with the mean and the
  // biased variance of each group of each item. y may be x.
  void (*forward)(const LaneMap& x, const LaneMap& y, const GroupNormSpec& spec, const GroupNormState& state,
                  HaloSpec halo, int threads);
  // Gradients for dy at y. dx may be dy; dgamma and dbeta may be null.
  void (*backward)(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const GroupNormSpec& spec,
                   const GroupNormState& state, float* dgamma, float* dbeta, int threads);
};

}  // namespace lipfast
