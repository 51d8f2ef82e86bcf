// BatchNorm on lane maps, fused with the activation behind it and the halo of what
// it writes.
//
// A channel is one unit of work: statistics, normalisation and halo pass over its
// plane while it is in the cache, and sums are taken in one fixed order, so results
// do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/pointwise.h"

namespace lipfast {

// The halo a kernel fills behind its own writes.
struct HaloSpec {
  bool fill;
  Padding padding;
  int64_t pad;
};

// Copies of the input where the output overwrites it (see engine/spare.h).
struct NormSpare {
  LaneMap planes;       // as many channels as were copied
  const int32_t* slot;  // [channels] which of them, -1: none; null: the output has its own memory
};

struct NormSpec {
  int64_t channels;
  float epsilon;
  float momentum;  // weight of the new statistics in the running ones
  ActivationSpec act;
  LivePixelMask live;
};

// All [channels].
struct NormState {
  const float* gamma;   // null: 1
  const float* beta;    // null: 0
  float* running_mean;  // null: not tracked
  float* running_variance;
  float* mean;  // of the batch, for the backward pass
  float* inverse_deviation;
  NormSpare spare;
};

struct NormKernels {
  // y = act(gamma * (x - mean) / sqrt(variance + epsilon) + beta) with the batch's
  // statistics, which also move the running ones (variance: unbiased). y may be x; for
  // a backward pass state.spare then names the channels to copy first.
  void (*train)(const LaneMap& x, const LaneMap& y, const NormSpec& spec, const NormState& state, HaloSpec halo,
                int threads);
  // The same with the running statistics.
  void (*evaluate)(const LaneMap& x, const LaneMap& y, const NormSpec& spec, const NormState& state, HaloSpec halo,
                   int threads);
  // Gradients for dy + dy2 (dy2 may be null) at y. dgamma and dbeta may be null.
  //   x                 what train() read; y, where that overwrote it (state.spare.slot is
  //                     set): the activation is then none, or leaky with a slope above 0
  //   batch_statistics  mean and inverse_deviation are the batch's, as train() leaves
  //                     them (evaluate() leaves the running ones there)
  //   dx                may be dy or dy2; `zero_halo`: its halo and dead pixels become 0
  void (*backward)(const LaneMap& x, const LaneMap& dy, const LaneMap* dy2, const LaneMap& dx, const NormSpec& spec,
                   const NormState& state, bool batch_statistics, float* dgamma, float* dbeta, bool zero_halo,
                   int threads);
};

}  // namespace lipfast
