#include "engine/spare.h"

#include <cmath>

namespace lipfast {
namespace {

// Recovering costs up to 2 |beta / gamma| units in the last place of a normalised
// value of size 1.
constexpr float kLeastGamma = 1.0f / 32.0f;  // of |beta|
constexpr float kTiny = 1e-20f;              // 1 / gamma must not overflow

bool Recoverable(float gamma, float beta) {  // false for NaN
  return std::fabs(gamma) >= kLeastGamma * std::fabs(beta) && std::fabs(gamma) >= kTiny;
}

}  // namespace

void SpareInputs::Choose(const LaneMap& x, const float* gamma, const float* beta) {
  slot_.assign(x.channels, -1);
  int32_t count = 0;
  for (int64_t c = 0; c < x.channels; ++c) {
    if (!Recoverable(gamma ? gamma[c] : 1.0f, beta ? beta[c] : 0.0f)) slot_[c] = count++;
  }
  planes_ = x;
  planes_.channels = count;
  planes_.halo = 0;
  planes_.row_stride = x.block_w * kGrid * kGrid;
  planes_.channel_stride = x.block_h * planes_.row_stride;
  planes_.batch_stride = count * planes_.channel_stride;
  const int64_t bytes = x.batch * planes_.batch_stride * static_cast<int64_t>(sizeof(float));
  if (bytes > this->bytes()) {
    memory_.reset();
    memory_ = std::make_unique<Arena>(bytes);
  }
  planes_.data = memory_ ? memory_->data() : nullptr;
}

}  // namespace lipfast
