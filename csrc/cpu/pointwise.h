// What works pixel by pixel on lane maps: activations, sums, products, scaling, PixelNorm.
//
// Maps of one call agree in batch, channels, sides and blocks; halos may differ and
// are neither read nor written. Dead pixels get values as any other pixel does.
// Output maps may be input maps.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace lipfast {

enum class Activation {
  kNone = 0,
  kRelu = 1,
  kLeaky = 2,
  kSigmoid = 3,
  kTanh = 4,
  kSilu = 5,
  kRelu6 = 6,
  kHardsigmoid = 7,
  kHardswish = 8,
  kGelu = 9,
  kGeluTanh = 10  // its approximation through tanh
};
constexpr Activation kLastActivation = Activation::kGeluTanh;

// Whether it costs next to nothing, so that a convolution does it as it stores.
static inline bool IsSimple(Activation act) {
  return act == Activation::kNone || act == Activation::kRelu || act == Activation::kLeaky || act == Activation::kRelu6;
}

struct ActivationSpec {
  Activation kind;
  float slope;  // of kLeaky below zero
};

struct PointwiseKernels {
  // y = act(x)
  void (*activate)(const LaneMap& x, const LaneMap& y, ActivationSpec act, int threads);
  // dx = dy * act'(x), added to what dx holds where `accumulate`
  void (*activate_backward)(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, ActivationSpec act, bool accumulate,
                            int threads);
  // y = a_scale * a + b_scale * b + shift; b may be null, of one pixel: a number for each plane, or of one channel.
  void (*combine)(const LaneMap& a, float a_scale, const LaneMap* b, float b_scale, float shift, const LaneMap& y,
                  int threads);
  // y = a * b, added to what y holds where `accumulate`. b may be of one pixel: a factor of each plane, or of one
  // channel.
  void (*multiply)(const LaneMap& a, const LaneMap& b, const LaneMap& y, bool accumulate, int threads);
  // y = sum over pixels of a * b, y being of one pixel; added to what it holds where `accumulate`. b null: of a.
  void (*dot_planes)(const LaneMap& a, const LaneMap* b, const LaneMap& y, const LivePixelMask& live, bool accumulate,
                     int threads);
  // *sum = sum over all pixels of a * b; b null: of a. `partial` holds a float for each plane.
  void (*total)(const LaneMap& a, const LaneMap* b, const LivePixelMask& live, float* partial, float* sum, int threads);
  // y = x / sqrt(mean over channels of x^2 + epsilon)
  void (*pixel_norm)(const LaneMap& x, const LaneMap& y, float epsilon, int threads);
  void (*pixel_norm_backward)(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, float epsilon, bool accumulate,
                              int threads);
};

}  // namespace lipfast
