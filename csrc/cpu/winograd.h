// 3x3 convolution, stride 1 or 2, padding 1, and 5x5, stride 1, padding 2, on lane maps by
// Winograd's minimal filtering.
//
// An output tile of T x T pixels (T = 4 or 2) comes from (T + 2)^2 products per pair
// of channels instead of 9 T^2: 4 times fewer for T = 4, 2.25 times for T = 2. With a
// stride of 2, from (2T + 1)^2: 1.78 and 1.44 times fewer (winograd_forms.h says how).
// 5x5 layers have tiles of 2 x 2 pixels, the same 36 frequencies as T = 4 instead of 100
// products: 2.78 times fewer.
// In the lane layout a tile's patch is whole vectors, so the transforms of
// Lavin & Gray 2016 (arXiv:1509.09308) use no shuffles: forward
//   U = G w G^T      weights, once per step
//   V = B^T x B      input tiles
//   M = sum over in channels of U V, a matrix product for each of (T + 2)^2 frequencies
//   y = A^T M A      output tiles
// and for the weight gradient, with dM = A dy A^T,
//   dU = sum over tiles and lanes of dM V^T,   dw = G^T dU G.
// The points are 0, +-5/8, +-3/2 and infinity for T = 4: two to three times more
// accurate than 0, +-1, +-2. Relative error (2-norm) on normal data against float64,
// 128 channels: 1.0e-6 for T = 4, 4e-7 for T = 2, direct convolution 2e-7; weight
// gradient of 128 x 128 pixels 1.4e-6, 1.0e-6 and (torch) 1.6e-6; 5x5 1.2e-6, weight
// gradient of 64 x 64 pixels 2.2e-6.
//
// Every value is computed by the same operations whatever `threads` is.
#pragma once

#include <cstdint>

#include "cpu/finish.h"
#include "cpu/lanes.h"

namespace lipfast {

// Frequencies of a filter along each side.
inline int64_t WinogradSide(int tile, int64_t kernel) { return tile + kernel - 1; }

// Products of a tile for each pair of channels.
inline int64_t WinogradProducts(int tile, int64_t kernel, int64_t stride) {
  const int64_t side = stride == 2 ? 2 * tile + 1 : WinogradSide(tile, kernel);
  return side * side;
}

// The tile for output blocks of this size: 2 where most of a 4 x 4 tile would be wasted.
inline int WinogradTile(int64_t block_h, int64_t block_w, int64_t kernel, int64_t stride) {
  if (kernel == 5) return 2;
  const int64_t fours = (block_h + 3) / 4 * ((block_w + 3) / 4) * WinogradProducts(4, kernel, stride);
  const int64_t twos = (block_h + 1) / 2 * ((block_w + 1) / 2) * WinogradProducts(2, kernel, stride);
  return fours <= twos ? 4 : 2;
}

constexpr int64_t kWinogradRows = 6, kWinogradNumbers = 16;  // rows of transformed weights, and their numbers, together

// Floats from frequency to frequency of the transformed weights, in rows of either channels: more than there are,
// for they come so many at a time, and so that frequencies fall into different cache sets.
inline int64_t WinogradWeightStep(int64_t out, int64_t in) {
  const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  const int64_t forward = up(out, kWinogradRows) * up(in, kWinogradNumbers);
  const int64_t transposed = up(in, kWinogradRows) * up(out, kWinogradNumbers);
  return (forward > transposed ? forward : transposed) + 80;
}

// Floats of the transformed weights, with either stride.
inline int64_t WinogradWeightFloats(int64_t out, int64_t in, int tile, int64_t kernel) {
  return WinogradSide(tile, kernel) * WinogradSide(tile, kernel) * WinogradWeightStep(out, in);
}

// Pointers to floats of scratch and maps are 64-byte aligned. `tile` is 4 or 2, for 5x5 layers 2; a 3x3 layer's
// padding is 1, a 5x5 layer's 2.
struct WinogradKernels {
  // w [out][in][kernel][kernel], zeros where pruned -> u [WinogradSide^2][out][in] in the kernels' own order,
  // frequencies WinogradWeightStep apart. transposed: for the input gradient, w turned by 180 degrees
  // and u [WinogradSide^2][in][out].
  void (*transform_weights)(const float* w, int64_t out, int64_t in, bool transposed, int tile, float* u, int threads);

  // y = act(scale * conv(x) + bias + residual), see ConvEnd; blocks of x are as many pixels as blocks of y times the
  // stride, and its halo is >= the padding and filled. Writes pixels of y and, where the end says so, zero
  // padding. u is from transform_weights for y.channels x x.channels; bias [y.channels] may be null.
  void (*forward)(const LaneMap& x, const float* u, const float* bias, const LaneMap& y, const ConvEnd& end, int tile,
                  float* scratch, int threads);
  int64_t (*forward_scratch)(const LaneMap& x, const LaneMap& y, int tile, int threads);

  // The same from dy (zero halo >= the padding, and dead pixels) to dx, with transposed weights. Writes all pixels of
  // dx.
  void (*input_gradient)(const LaneMap& dy, const float* u, const float* bias, const LaneMap& dx, const ConvEnd& end,
                         int tile, float* scratch, int threads);
  int64_t (*input_gradient_scratch)(const LaneMap& dy, const LaneMap& dx, int tile, int threads);

  // dw [dy.channels][x.channels][kernel][kernel] of the layer y = conv(x). x as in forward;
  // dead pixels of dy are zero, its halo is not read.
  void (*weight_gradient)(const LaneMap& x, const LaneMap& dy, float* dw, int tile, float* scratch, int threads);
  int64_t (*weight_gradient_scratch)(const LaneMap& x, const LaneMap& dy, int tile, int threads);
};

// Those of a layer that the first lines name, in the active instruction set.
const WinogradKernels& WinogradKernelsOf(int64_t kernel, int64_t stride);

// Of 5x5 layers.
struct FiveTapWinogradKernels {
  WinogradKernels kernels;
};

// Of 3x3 layers with a stride of 2.
struct StridedWinogradKernels {
  WinogradKernels kernels;
};

}  // namespace lipfast
