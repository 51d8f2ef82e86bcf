// Optimiser steps on one flat vector of weights: the kept values of a pruned
// network, or any other parameters. The work is in proportion to the vector.
//
//   Kernels<StepKernels>().adam(settings, step, values, gradient, m, v, n, threads);
//
// Both follow torch.optim's single-tensor form operation by operation, with the
// multiply-adds that torch's own vector kernels fuse fused here as well, on every
// target. So the bits depend neither on the instruction set nor on the number of
// threads, and are torch's wherever torch runs its AVX2 or AVX-512 kernels, but for
// Adam's root: MKL's, which torch calls, misses the nearest float in 0.6 % of cases.
#pragma once

#include <cstdint>

namespace lipfast {

// torch.optim.Adam's settings; as doubles, because torch derives its scalars so.
struct AdamSettings {
  double lr, beta1, beta2, eps, weight_decay;
};

// torch.optim.SGD's settings.
struct SgdSettings {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};

struct StepKernels {
  // One step in place. step counts from 1 (its first call). No alignment asked;
  // no array overlaps another. gradient is only read.
  void (*adam)(const AdamSettings& settings, int64_t step, float* values, const float* gradient, float* m, float* v,
               int64_t n, int threads);
  // momentum_buffer [n] is overwritten at step 1 and may be null when momentum is 0.
  void (*sgd)(const SgdSettings& settings, int64_t step, float* values, const float* gradient, float* momentum_buffer,
              int64_t n, int threads);
};

}  // namespace lipfast
