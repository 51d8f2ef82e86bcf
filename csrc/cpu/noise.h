// Gaussian noise without a state: each number is a function of seed, step and place, so any thread draws any part.
//
//   Kernels<NoiseKernels>().add_noise(base, n, scale, seed, step, to, threads);
//
// Threefry4x32 with twenty rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which needs
// sums and rotations of 32 bits only, gives four words for each counter, two of them a pair of normals (Box & Muller
// 1958). The bits depend neither on the instruction set nor on the number of threads.
#pragma once

#include <cstdint>

namespace lipfast {

struct NoiseKernels {
  // to[i] = base[i] + scale * normal(seed, step, i) for i < n. No alignment asked; `to` may be `base`.
  void (*add_noise)(const float* base, int64_t n, float scale, uint64_t seed, uint64_t step, float* to, int threads);
};

}  // namespace lipfast
