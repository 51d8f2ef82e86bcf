// The direct convolution kernels, all of one form: an output vector is the sum of
// weight * input vector at an offset that depends on the weight alone,
//
//   out[o][p] = bias[o] + sum over taps t of o:  value[t] * in[p + offset[t]]
//
// Kernel size, stride, dilation, groups, zeros, padding and direction are all in
// the offsets and in which positions p a region visits, so forward and input
// gradient of every convolution are this one kernel, and weight gradients are its
// counterpart
//
//   d_value[t] = sum over p:  out[o][p] * in[p + offset[t]]
#pragma once

#include <cstdint>

namespace lipfast {

// rows x cols output vectors and the input vectors they start from. Strides in floats.
struct Region {
  int64_t rows, cols;
  float* out;
  int64_t out_channel, out_row, out_col;
  const float* in;
  int64_t in_channel, in_row, in_col;
};

// Per output channel its taps, in ascending input channel, cut into `blocks` ranges
// of input channels: the taps of output o and block b are starts[o * (blocks + 1) + b]
// up to the next start. `visits` counts the taps before (o, b) in the order of the
// kernels, which take every output of a block before the next block.
struct TapList {
  int64_t outputs, blocks;
  int64_t inputs;     // input channels
  int64_t tile_rows;  // 1 or the kernels' largest
  bool look_ahead;    // fetch the next tile early: memory is what bounds this list
  const int32_t* starts;
  const int32_t* visits;   // [outputs][blocks]
  const int32_t* offsets;  // floats
};

// Dense taps: every output channel of a group of `width` (the last group may be
// narrower) has the same offsets.
struct DenseTaps {
  int64_t outputs, taps;
  const int32_t* offsets;  // [taps]
};

struct TapKernels {
  // out = bias + taps (bias null: zero). Regions are disjoint in their outputs.
  void (*sparse_accumulate)(const Region* regions, int64_t count, const TapList& taps, const float* values,
                            const float* bias, int threads);
  // d_values[t] = sum over all regions' positions. `partial` holds
  // sparse_dot_chunks(...) * (number of taps) floats.
  void (*sparse_dot)(const Region* regions, int64_t count, const TapList& taps, float* partial, float* d_values,
                     int threads);
  int64_t (*sparse_dot_chunks)(const Region* regions, int64_t count, const TapList& taps);
  // The same for dense taps; weights are [ceil(outputs / group)][taps][group].
  void (*dense_accumulate)(const Region* regions, int64_t count, const DenseTaps& taps, const float* weights,
                           const float* bias, int threads);
  // The gradients [outputs][taps] end up first in `partial`, which holds
  // dense_dot_chunks(...) * outputs * taps floats.
  void (*dense_dot)(const Region* regions, int64_t count, const DenseTaps& taps, float* partial, int threads);
  int64_t (*dense_dot_chunks)(const Region* regions, int64_t count);
  // Sum over a region's positions of each output channel.
  void (*channel_sums)(const Region* regions, int64_t count, int64_t channels, float* sums, int threads);
  int64_t dense_group;           // output channels that dense weights are interleaved by
  int64_t tile_rows, tile_cols;  // output vectors that the sparse kernels hold in registers, at most
  int64_t first_level;           // bytes of the first cache level of the machines that run this target
};

}  // namespace lipfast
