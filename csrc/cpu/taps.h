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

#include "cpu/pointwise.h"

namespace lipfast {

// rows x cols output vectors and the input vectors they start from. Strides in floats.
struct Region {
  int64_t rows, cols;
  float* out;
  int64_t out_channel, out_row, out_col;
  const float* in;
  int64_t in_channel, in_row, in_col;
  // What is added to each output vector, as far apart as those along a row; null: nothing.
  const float* residual;
  int64_t residual_channel, residual_row;
};

constexpr int64_t kTapsAhead = 4;  // offsets that kernels read beyond the last tap's

// Taps in the order in which the kernels take them: input channels are cut into
// `blocks` ranges, every output takes its taps of a block before any takes those of
// the next. The taps of output o and block b are starts[b * outputs + o] up to the
// next start.
struct TapList {
  int64_t outputs, blocks;
  int64_t tile_rows;       // 1 or 2
  const int32_t* starts;   // [blocks * outputs + 1]
  const int32_t* offsets;  // [taps + kTapsAhead], floats; the last are read ahead and not used
  const int32_t* order;    // [taps], place in the packed values
  bool overlap;            // neighbouring outputs read the same vectors
  // What a tile reads and the tile before it did not: vectors of the first block's
  // channels, floats from the tile's first position; other blocks lie block_stride on.
  const int32_t* fresh;
  int64_t fresh_count, block_stride;
};

// Dense taps: every output channel of a group of `width` (the last group may be
// narrower) has the same offsets.
struct DenseTaps {
  int64_t outputs, taps;
  const int32_t* offsets;  // [taps]
};

// Floats that one chunk of sparse_dot or dense_dot sums up: a gradient of each weight, and a vector of each output.
inline int64_t DotFloats(int64_t weights, int64_t outputs) { return (weights + 15) / 16 * 16 + 16 * outputs; }

// What follows the sums. With a halo, regions are the blocks of a map of height x width
// pixels on that grid, and zero padding is written around them, see ZeroHalo.
struct TapEnd {
  ActivationSpec act = {};  // a simple one
  int64_t halo = 0, height = 0, width = 0, grid = 0;
};

struct TapKernels {
  // out = end(bias + taps + residual) (bias null: zero). Regions are disjoint in their outputs.
  // `values` in the list's order; one float beyond the last is read and not used.
  void (*sparse_accumulate)(const Region* regions, int64_t count, const TapList& taps, const float* values,
                            const float* bias, const TapEnd& end, int threads);
  // The same for outputs [first, last) of one region, on the calling thread; no halo is written.
  void (*sparse_outputs)(const Region& region, const TapList& taps, const float* values, const float* bias,
                         ActivationSpec act, int64_t first, int64_t last);
  // d_values[order[t]] = sum over all regions' positions; d_bias[o] the sum of out[o] alone (null:
  // not wanted). `partial`, 64-byte aligned, holds sparse_dot_chunks(...) * DotFloats(...) floats.
  void (*sparse_dot)(const Region* regions, int64_t count, const TapList& taps, float* partial, float* d_values,
                     float* d_bias, int threads);
  int64_t (*sparse_dot_chunks)(const Region* regions, int64_t count, const TapList& taps);
  // The same for dense taps; weights are [ceil(outputs / dense_group)][taps][dense_group].
  void (*dense_accumulate)(const Region* regions, int64_t count, const DenseTaps& taps, const float* weights,
                           const float* bias, const TapEnd& end, int threads);
  // As sparse_outputs; `first` is a multiple of dense_group.
  void (*dense_outputs)(const Region& region, const DenseTaps& taps, const float* weights, const float* bias,
                        ActivationSpec act, int64_t first, int64_t last);
  // The gradients [outputs][taps] end up first in `partial`, which holds
  // dense_dot_chunks(...) * DotFloats(outputs * taps, outputs) floats.
  void (*dense_dot)(const Region* regions, int64_t count, const DenseTaps& taps, float* partial, float* d_bias,
                    int threads);
  int64_t (*dense_dot_chunks)(const Region* regions, int64_t count);
  // Sum over a region's positions of each output channel.
  void (*channel_sums)(const Region* regions, int64_t count, int64_t channels, float* sums, int threads);
  int64_t tile_vectors;  // output vectors that the sparse kernels hold in registers, at most
  int64_t tile_cols;     // and how many of them side by side
  int64_t dense_group;   // output channels that dense weights are interleaved by
};

}  // namespace lipfast
