// Sums over the pixels of the pictures of one plane, and the way back; for kernel sources only.
#pragma once

#include "cpu/lanes.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

// The sum of each lane. term(row, i): what the vector at float i of a row of blocks adds. Line by line, as ChannelSums
// in taps.cc; dead pixels do not count.
template <class Term>
static inline V SumLanes(const LaneMap& m, const LivePixelMask& live, const Term& term) {
  V total = Zero();
  for (int64_t row = 0; row < m.block_h; ++row) {
    V line = Zero();
    for (int64_t i = 0; i < m.block_w * kLanes; i += kLanes) {
      const V v = term(row, i);
      line = Add(line, live.rows ? Mul(v, LoadU(live.columns + i)) : v);
    }
    total = Add(total, live.rows ? Mul(line, LoadU(live.rows + row * kLanes)) : line);
  }
  return total;
}

// Numbers of planes, summed up over the batch: out[c * step] is that of channel c, or with step 0 *out that of all.
static inline void SumPlanes(const float* of_planes, const LaneMap& m, int64_t step, float* out) {
  double total = 0;
  for (int64_t c = 0; c < m.channels; ++c) {
    for (int64_t n = 0; n < m.batch; ++n) total += of_planes[n * m.channels + c];
    out[c * step] = static_cast<float>(total);
    if (step > 0) total = 0;
  }
}

// One number for each picture is a map of one pixel: in the lane of the picture's first block, 0 in the others.
static inline V SumPictures(V lanes, int64_t grid) {
  if (grid == 1) return lanes;
  alignas(64) float each[kLanes], sums[kLanes] = {};
  Store(each, lanes);
  if (grid == kGrid) {
    sums[0] = Sum(lanes);
  } else {
    for (int l = 0; l < kLanes; ++l) sums[l & ~3] += each[l];  // of four blocks
  }
  return Load(sums);
}

// The number of each picture in all its lanes.
static inline V SpreadPictures(const float* pixel, int64_t grid) {
  if (grid == kGrid) return Set(*pixel);
  if (grid == 1) return Load(pixel);
  alignas(64) float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = pixel[l & ~3];
  return Load(lanes);
}

}  // namespace LIPFAST_NS
}  // namespace lipfast
