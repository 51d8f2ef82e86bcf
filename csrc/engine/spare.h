// Inputs of a BatchNorm that its result does not tell.
//
// Where the result overwrites the input, the backward pass recovers the normalised
// value as (act^-1(y) - beta) / gamma. That loses digits in a channel whose gamma is
// small beside its beta, and everything where gamma is 0: such channels keep a copy
// of their input here.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/arena.h"
#include "cpu/lanes.h"
#include "cpu/norm.h"

namespace lipfast {

class SpareInputs {
 public:
  // Picks the channels of `x` that need a copy, by what gamma and beta are now (null:
  // 1 and 0), and gets memory for them. Throws std::bad_alloc.
  void Choose(const LaneMap& x, const float* gamma, const float* beta);
  // As Choose left it.
  NormSpare View() const { return {planes_, slot_.data()}; }
  int64_t bytes() const { return memory_ ? memory_->bytes() : 0; }

 private:
  std::vector<int32_t> slot_;
  LaneMap planes_ = {};
  std::unique_ptr<Arena> memory_;
};

}  // namespace lipfast
