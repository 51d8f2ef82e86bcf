// The sum over the pixels of one plane; for kernel sources only.
#pragma once

#include "cpu/lanes.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

// term(row, i): what the vector at float i of a row of blocks adds. Line by line, as ChannelSums in taps.cc; dead
// pixels do not count.
template <class Term>
static inline float SumPlane(const LaneMap& m, const LivePixelMask& live, const Term& term) {
  V total = Zero();
  for (int64_t row = 0; row < m.block_h; ++row) {
    V line = Zero();
    for (int64_t i = 0; i < m.block_w * kLanes; i += kLanes) {
      const V v = term(row, i);
      line = Add(line, live.rows ? Mul(v, LoadU(live.columns + i)) : v);
    }
    total = Add(total, live.rows ? Mul(line, LoadU(live.rows + row * kLanes)) : line);
  }
  return Sum(total);
}

}  // namespace LIPFAST_NS
}  // namespace lipfast
