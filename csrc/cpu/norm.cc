#include "cpu/norm.h"

#include <cstring>

#include "cpu/activation.h"
#include "cpu/halo.h"
#include "cpu/norm_parts.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

namespace {

Affine AffineOf(const NormState& state, int64_t c) {
  return ScaleAndShift(state.gamma, state.beta, c, Set(state.mean[c]), Set(state.inverse_deviation[c]));
}

// Fills the halos of one channel after another.
class ChannelHalos {
 public:
  ChannelHalos(const LaneMap& m, const HaloSpec& halo)
      : map_(m), wanted_(halo.fill), filler_(m, halo.padding, halo.pad) {}
  void Fill(int64_t c) const {
    for (int64_t n = 0; wanted_ && n < map_.batch; ++n) filler_.Fill(map_.At(n, c));
  }

 private:
  LaneMap map_;
  bool wanted_;
  HaloFiller filler_;
};

void CopyPlane(const LaneMap& from, const LaneMap& to) {
  for (int64_t n = 0; n < from.batch; ++n) {
    for (int64_t row = 0; row < from.block_h; ++row) {
      std::memcpy(to.At(n, 0, row), from.At(n, 0, row), from.block_w * kLanes * sizeof(float));
    }
  }
}

void Finish(const LaneMap& x, const LaneMap& y, int64_t c, const NormSpec& spec, const NormState& state,
            const ChannelHalos& halos) {
  const NormSpare& spare = state.spare;
  if (spare.slot && spare.slot[c] >= 0) CopyPlane(Plane(x, c), Plane(spare.planes, spare.slot[c]));
  WithActivation<NormaliseChannel>(spec.act.kind, x, y, c, AffineOf(state, c), spec.act.slope);
  halos.Fill(c);
}

void Train(const LaneMap& x, const LaneMap& y, const NormSpec& spec, const NormState& state, HaloSpec halo,
           int threads) {
  const double count = static_cast<double>(x.pixels());
  const ChannelHalos halos(y, halo);
  ParallelFor(threads, spec.channels, [&](int64_t c) {
    const Moments moments = ChannelMoments(x, c, spec.live);
    state.mean[c] = static_cast<float>(moments.mean);
    state.inverse_deviation[c] = static_cast<float>(1.0 / sqrt(moments.variance + spec.epsilon));
    if (state.running_mean) {
      const double unbiased = moments.variance * count / (count - 1);
      const double keep = 1.0 - spec.momentum;
      state.running_mean[c] = static_cast<float>(keep * state.running_mean[c] + spec.momentum * moments.mean);
      state.running_variance[c] = static_cast<float>(keep * state.running_variance[c] + spec.momentum * unbiased);
    }
    Finish(x, y, c, spec, state, halos);
  });
}

void Evaluate(const LaneMap& x, const LaneMap& y, const NormSpec& spec, const NormState& state, HaloSpec halo,
              int threads) {
  const ChannelHalos halos(y, halo);
  ParallelFor(threads, spec.channels, [&](int64_t c) {
    state.mean[c] = state.running_mean[c];
    state.inverse_deviation[c] = static_cast<float>(1.0 / sqrt(state.running_variance[c] + spec.epsilon));
    Finish(x, y, c, spec, state, halos);
  });
}

template <Activation kAct>
struct FromBatchInput : FromInput<kAct> {
  FromBatchInput(const NormSpec& spec, const NormState& state, int64_t c)
      : FromInput<kAct>(AffineOf(state, c), spec.act.slope, Set(state.mean[c]), Set(state.inverse_deviation[c])) {}
};

// As FromInput from the norm's result, for activations that keep the sign and can be undone.
template <Activation kAct>
struct FromResult {
  V low, undo, beta, inverse_gamma;

  FromResult(const NormSpec& spec, const NormState& state, int64_t c)
      : low(Set(spec.act.slope)),
        undo(Set(1.0f / spec.act.slope)),
        beta(Set(state.beta ? state.beta[c] : 0.0f)),
        inverse_gamma(Set(1.0f / (state.gamma ? state.gamma[c] : 1.0f))) {}
  V Slope(V out) const { return ActSlope<kAct>(out, low); }
  V Normalised(V out) const {
    const V z = kAct == Activation::kNone ? out : IfPositive(out, out, Mul(out, undo));
    return Mul(Sub(z, beta), inverse_gamma);
  }
};

// `source` is the one channel that `Recover` reads.
template <class Recover, Activation kAct, bool kTwo>
void BackwardChannel(const LaneMap& source, const LaneMap& dy, const LaneMap* dy2, const LaneMap& dx, int64_t c,
                     const NormSpec& spec, const NormState& state, bool batch_statistics, double* sums) {
  const Recover recover(spec, state, c);
  const auto row_gradient = [&](int64_t n, int64_t row) {
    return RowGradient<Recover, kAct, kTwo>{source.At(n, 0, row), dy.At(n, c, row), kTwo ? dy2->At(n, c, row) : nullptr,
                                            recover};
  };
  SumChannel<2>(source, spec.live, GradientTerms(row_gradient), sums);
  const double count = batch_statistics ? static_cast<double>(dy.pixels()) : 0.0;
  const V scale = AffineOf(state, c).scale;
  const V last_scale = Mul(scale, LastPictures(dy));  // gradients of missing pictures stay zero
  const V constant = Set(count > 0 ? static_cast<float>(sums[0] / count) : 0.0f);
  const V along = Set(count > 0 ? static_cast<float>(-sums[1] / count) : 0.0f);
  const Upcoming next_x(source, dy, c), next_dy(dy, dy, c);
  for (int64_t n = 0; n < dy.batch; ++n) {
    const V by = n + 1 < dy.batch ? scale : last_scale;
    for (int64_t row = 0; row < dy.block_h; ++row) {
      const auto at = row_gradient(n, row);
      float* out = dx.At(n, c, row);
      for (int64_t col = 0; col < dy.block_w; ++col) {
        V g, normalised;
        next_x.Fetch(at.x + col * kLanes);
        next_dy.Fetch(at.dy + col * kLanes);
        at.At(col, &g, &normalised);
        Store(out + col * kLanes, Mul(by, Fma(along, normalised, Sub(g, constant))));
      }
    }
  }
}

template <template <Activation> class Recover, Activation kAct>
void BackwardFrom(const LaneMap& source, const LaneMap& dy, const LaneMap* dy2, const LaneMap& dx, int64_t c,
                  const NormSpec& spec, const NormState& state, bool batch_statistics, double* sums) {
  if (dy2) {
    BackwardChannel<Recover<kAct>, kAct, true>(source, dy, dy2, dx, c, spec, state, batch_statistics, sums);
  } else {
    BackwardChannel<Recover<kAct>, kAct, false>(source, dy, dy2, dx, c, spec, state, batch_statistics, sums);
  }
}

template <Activation kAct>
struct BackwardPicked {
  static void Run(const LaneMap& x, const LaneMap& dy, const LaneMap* dy2, const LaneMap& dx, int64_t c,
                  const NormSpec& spec, const NormState& state, bool batch_statistics, double* sums) {
    constexpr bool kCanBeUndone = kAct == Activation::kNone || kAct == Activation::kLeaky;
    const NormSpare& spare = state.spare;
    if (spare.slot && spare.slot[c] >= 0) {
      const LaneMap copy = Plane(spare.planes, spare.slot[c]);
      BackwardFrom<FromBatchInput, kAct>(copy, dy, dy2, dx, c, spec, state, batch_statistics, sums);
    } else if (kCanBeUndone && spare.slot) {
      constexpr Activation kUndone = kCanBeUndone ? kAct : Activation::kNone;
      BackwardFrom<FromResult, kUndone>(Plane(x, c), dy, dy2, dx, c, spec, state, batch_statistics, sums);
    } else {
      BackwardFrom<FromBatchInput, kAct>(Plane(x, c), dy, dy2, dx, c, spec, state, batch_statistics, sums);
    }
  }
};

void Backward(const LaneMap& x, const LaneMap& dy, const LaneMap* dy2, const LaneMap& dx, const NormSpec& spec,
              const NormState& state, bool batch_statistics, float* dgamma, float* dbeta, bool zero_halo, int threads) {
  const ChannelHalos halos(dx, {zero_halo, Padding::kZero, 0});
  ParallelFor(threads, spec.channels, [&](int64_t c) {
    double sums[2] = {0, 0};
    double* const out = sums;
    WithActivation<BackwardPicked>(spec.act.kind, x, dy, dy2, dx, c, spec, state, batch_statistics, out);
    if (dbeta) dbeta[c] = static_cast<float>(sums[0]);
    if (dgamma) dgamma[c] = static_cast<float>(sums[1]);
    halos.Fill(c);
  });
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {Train, Evaluate, Backward};

}  // namespace LIPFAST_NS
}  // namespace lipfast
