// One 2-D convolution on lane maps: forward, input gradient, weight gradient.
//
// Weights are packed: `values` holds the kept weights of w[out][in][kh][kw] in
// row-major order (all of them where the layer is dense), and so do gradients.
// Which kernel runs each direction (direct sparse, Winograd, dense) is settled at
// construction (cpu/choice.h), never by timing.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/finish.h"
#include "cpu/lanes.h"

namespace lipfast {

enum class ConvKernel { kAuto = 0, kSparse = 1, kWinograd = 2, kDense = 3 };

struct ConvShape {
  int64_t out_channels, in_channels, groups;
  int64_t kernel_h, kernel_w;
  int64_t stride, dilation;
  int64_t pad_h, pad_w;
  Padding padding;
};

// The maps a convolution runs on; two geometries need two Conv objects.
struct ConvGeometry {
  int64_t batch, height, width;    // sheets, pixels of the input
  int64_t in_block_h, in_block_w;  // stride * out_block exactly
  int64_t out_block_h, out_block_w;
  int64_t grid = kGrid;

  int64_t pictures() const { return batch * SheetOn(grid); }  // at most
};

struct PreparedConv;

class Conv {
 public:
  // mask: bytes [out][in / groups][kh][kw], 1 = kept; null = dense.
  // exact: never Winograd, whose error is a few times larger.
  Conv(const ConvShape& shape, const ConvGeometry& geometry, const uint8_t* mask, ConvKernel asked, bool exact);
  ~Conv();

  int64_t kept() const;
  int64_t out_height() const;
  int64_t out_width() const;
  // Floats of scratch memory, 64-byte aligned, that each call below may use when it
  // gets that many threads.
  int64_t scratch_floats(int threads) const;
  // What runs: "sparse", "winograd" or "dense".
  const char* forward_kernel() const;
  const char* input_gradient_kernel() const;
  const char* weight_gradient_kernel() const;

  // y = act(scale * conv(x) + bias + residual), see ConvEnd. The halo of x reaches >= pad (dilation * (kernel - 1) / 2
  // for a "same" layer) and is filled. bias may be null. Of y, pixels are written, and its halo where `end` says so.
  void Forward(const float* values, const float* bias, const LaneMap& x, const LaneMap& y, float* scratch, int threads,
               const ConvEnd& end = {}) const;

  // Forward in two halves, for weights that stay the same from call to call. Prepare puts them in the form
  // that the kernel wants, scaled where end.scale says so, into prepared_floats() floats, 64-byte aligned;
  // ForwardPrepared takes maps with the strides of those given here, and the same end.
  int64_t prepared_floats() const;
  void Prepare(const float* values, const LaneMap& x, float* prepared, float* scratch, int threads,
               const ConvEnd& end = {}) const;
  void ForwardPrepared(const float* prepared, const float* bias, const LaneMap& x, const LaneMap& y, float* scratch,
                       int threads, const ConvEnd& end = {}) const;

  // Whether RunPair may run the two: the second, by the sparse kernel, makes each channel from that channel, and
  // the first is not Winograd's.
  static bool IsPair(const Conv& first, const Conv& second);

  // y = second(first(x)), see cpu/pair.h. `between` has no memory, but the sizes and strides of the map between the
  // two, for which the second's weights were prepared; its halo, filled as `halo` says, reaches as far as the second
  // wants.
  static void RunPair(const PreparedConv& first, const PreparedConv& second, const LaneMap& x, const LaneMap& between,
                      const HaloSpec& halo, const LaneMap& y, const HaloSpec& y_halo, int threads);

  // How far the halo of dy must reach (filled with zeros, dead pixels too) for the
  // input gradient; the weight gradient wants zero dead pixels only.
  int64_t gradient_halo() const;

  // dx = conv^T(dy), padding included: contributions to padding pixels are added to
  // the pixels they copy. Writes pixels of dx only; dead ones end as finite numbers.
  void InputGradient(const float* values, const LaneMap& dy, const LaneMap& dx, float* scratch, int threads) const;

  // dvalues (kept) and, unless null, dbias (out_channels); both overwritten.
  void WeightGradient(const LaneMap& x, const LaneMap& dy, float* dvalues, float* dbias, float* scratch,
                      int threads) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// A convolution with prepared weights and what follows its sums; any activation.
struct PreparedConv {
  const Conv* conv;
  const float* weights;
  const float* bias;  // null: zero
  ActivationSpec act;
};

}  // namespace lipfast
