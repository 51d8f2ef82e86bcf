// What inference does behind a convolution: BatchNorm with running statistics, a
// residual sum, an activation, a product, and the halo of what is written. A convolution can do all
// of it as it stores (ConvEnd), but for some activations; FinishKernels do it in one pass
// over the result.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/norm.h"
#include "cpu/pointwise.h"

namespace lipfast {

// A BatchNorm's numbers, all [channels]; mean null: no BatchNorm, but a factor and a shift.
struct NormNumbers {
  const float* gamma;  // null: 1
  const float* beta;   // null: 0
  const float* mean;
  const float* variance;
  float epsilon;
  int64_t gamma_step = 1, beta_step = 1;  // 0: the first number is that of all channels
};

// gamma * (x - mean) / deviation + beta = scale * x + shift
struct FinishAffine {
  float scale, shift;
};

static inline FinishAffine FinishAffineOf(const NormNumbers& norm, int64_t c) {
  const float gamma = norm.gamma ? norm.gamma[c * norm.gamma_step] : 1.0f;
  const float beta = norm.beta ? norm.beta[c * norm.beta_step] : 0.0f;
  if (!norm.mean) return {gamma, beta};
  const double deviation = std::sqrt(static_cast<double>(norm.variance[c]) + norm.epsilon);
  const float scale = static_cast<float>(1.0 / deviation) * gamma;
  return {scale, beta - norm.mean[c] * scale};
}

// What follows the sum over taps in the forward pass: y = act(scale * sum + bias + residual).
struct ConvEnd {
  ActivationSpec act = {};            // a simple one
  const float* scale = nullptr;       // [out_channels]; null: 1
  const LaneMap* residual = nullptr;  // of the sizes and blocks of y, elsewhere in memory; null: none
  HaloSpec halo = {};                 // of y
};

struct FinishKernels {
  // y = act(gamma * (x - mean) / sqrt(variance + epsilon) + beta + residual) * factor.
  // residual and factor may be null. Maps agree in batch, channels, sides and blocks; y may be x.
  void (*finish)(const LaneMap& x, const LaneMap* residual, const LaneMap* factor, const LaneMap& y,
                 const NormNumbers& norm, ActivationSpec act, HaloSpec halo, int threads);
};

}  // namespace lipfast
