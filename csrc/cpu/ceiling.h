// The ceilings a benchmark compares itself with: what this machine can do at most.
#pragma once

#include <cstdint>

namespace lipfast {

struct CeilingKernels {
  // Runs `rounds` rounds of fused multiply-adds that wait for nothing but each
  // other, in registers only. Returns their sum, so that nothing is optimised away.
  float (*fma_burst)(int64_t rounds);
  // Floating-point operations of one round: 2 for each multiply-add of each lane.
  int64_t flops_per_round;
  // Copies vector by vector, as a kernel would.
  void (*copy)(const float* from, float* to, int64_t vectors);
};

}  // namespace lipfast
