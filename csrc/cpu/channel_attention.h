// Softmax attention of channels: each looks at the other channels of its head, and pixels are what they are compared
// by.
//
// A score is the product of two planes, summed over a picture's pixels; what a channel sees are planes times weights,
// as in a 1x1 convolution whose weights a picture makes for itself. The matrices are small: backward computes them
// again. Pictures have all lanes, as on a grid of 4.
//
// Source: S. W. Zamir et al., "Restormer", 2022; A. El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", 2021.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace lipfast {

// A map and, for each problem, which is a head of a picture, the place of its first channel among the map's floats.
struct ChannelHeads {
  LaneMap map;
  const int64_t* at;  // [problems]
};

struct ChannelAttentionSpec {
  int64_t problems, channels;  // of a head
  float scale;                 // of the scores
  const float* factors;        // [problems], of the scores, too; null: none
  float* factor_gradient;      // [problems], overwritten; null: not wanted
  float epsilon;  // planes of queries and keys are divided by their norms, or by this where it is larger; below 0: not
  LivePixelMask live;
};

struct ChannelAttentionKernels {
  // seen = softmax(scale * factor * query key^T) value for each problem, all maps in equal blocks. `scratch`, 64-byte
  // aligned, holds floats(spec, false).
  void (*forward)(const ChannelHeads& query, const ChannelHeads& key, const ChannelHeads& value,
                  const ChannelHeads& seen, const ChannelAttentionSpec& spec, float* scratch, int threads);
  // Adds the gradients for dy at `seen`; each of the three may be null. `scratch` holds floats(spec, true).
  void (*backward)(const ChannelHeads& query, const ChannelHeads& key, const ChannelHeads& value,
                   const ChannelHeads& dy, const ChannelHeads* dquery, const ChannelHeads* dkey,
                   const ChannelHeads* dvalue, const ChannelAttentionSpec& spec, float* scratch, int threads);
  int64_t (*floats)(const ChannelAttentionSpec& spec, bool backward);
};

}  // namespace lipfast
