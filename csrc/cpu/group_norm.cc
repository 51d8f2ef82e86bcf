#include "cpu/group_norm.h"

#include <cmath>
#include <vector>

#include "cpu/activation.h"
#include "cpu/halo.h"
#include "cpu/norm_parts.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// The group of one item that is unit i of the work.
struct Group {
  int64_t item, first, last;  // channels

  Group(const LaneMap& m, int64_t groups, int64_t i)
      : item(i / groups), first(m.channels / groups * (i % groups)), last(m.channels / groups * (i % groups + 1)) {}
};

// One channel of one item.
LaneMap PlaneOf(const LaneMap& m, int64_t n, int64_t c) {
  LaneMap plane = Plane(m, c);
  plane.data = m.At(n, c);
  plane.batch = 1;
  return plane;
}

// The channels of a group as a batch of planes.
LaneMap PlanesOf(const LaneMap& m, const Group& group) {
  LaneMap planes = PlaneOf(m, group.item, group.first);
  planes.batch = group.last - group.first;
  planes.batch_stride = m.channel_stride;
  return planes;
}

// What normalises a channel of unit i, and undoes it.
struct Numbers {
  float gamma, mean, inverse;
  Affine affine;

  Numbers(const GroupNormState& state, int64_t i, int64_t c)
      : gamma(state.gamma ? state.gamma[c] : 1.0f),
        mean(state.mean[i]),
        inverse(state.inverse_deviation[i]),
        affine(ScaleAndShift(state.gamma, state.beta, c, mean, inverse)) {}
};

void Forward(const LaneMap& x, const LaneMap& y, const GroupNormSpec& spec, const GroupNormState& state, HaloSpec halo,
             int threads) {
  const HaloFiller filler(y, halo.padding, halo.pad);
  ParallelFor(threads, x.batch * spec.groups, [&](int64_t i) {
    const Group group(x, spec.groups, i);
    const Moments moments = ChannelMoments(PlanesOf(x, group), 0, spec.live);
    state.mean[i] = static_cast<float>(moments.mean);
    state.inverse_deviation[i] = static_cast<float>(1.0 / sqrt(moments.variance + spec.epsilon));
    for (int64_t c = group.first; c < group.last; ++c) {
      const LaneMap from = PlaneOf(x, group.item, c), to = PlaneOf(y, group.item, c);
      WithActivation<NormaliseChannel>(spec.act.kind, from, to, 0, Numbers(state, i, c).affine, spec.act.slope);
      if (halo.fill) filler.Fill(y.At(group.item, c));
    }
  });
}

// The gradients of one plane, row by row.
template <Activation kAct>
struct PlaneGradient {
  const LaneMap &x, &dy;
  const FromInput<kAct> recover;

  PlaneGradient(const LaneMap& in, const LaneMap& gradient, const Numbers& numbers, float slope)
      : x(in), dy(gradient), recover(numbers.affine, slope, numbers.mean, numbers.inverse) {}
  RowGradient<FromInput<kAct>, kAct, false> operator()(int64_t, int64_t row) const {
    return {x.At(0, 0, row), dy.At(0, 0, row), nullptr, recover};
  }
};

template <Activation kAct>
struct SumPlane {
  static void Run(const LaneMap& x, const LaneMap& dy, const Numbers& numbers, const GroupNormSpec& spec,
                  double* sums) {
    SumGradients(x, spec.live, PlaneGradient<kAct>(x, dy, numbers, spec.act.slope), sums);
  }
};

// dx = inverse_deviation * (gamma * g - constant - along * normalised)
template <Activation kAct>
struct WriteGradient {
  static void Run(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const Numbers& numbers, float slope,
                  float constant, float along) {
    const PlaneGradient<kAct> gradient(x, dy, numbers, slope);
    const V scale = Set(numbers.affine.scale);
    const V less = Set(-numbers.inverse * constant), tilt = Set(-numbers.inverse * along);
    for (int64_t row = 0; row < x.block_h; ++row) {
      const auto at = gradient(0, row);
      float* out = dx.At(0, 0, row);
      for (int64_t col = 0; col < x.block_w; ++col) {
        V g, normalised;
        at.At(col, &g, &normalised);
        Store(out + col * kLanes, Fma(g, scale, Fma(normalised, tilt, less)));
      }
    }
  }
};

// to[c] = the sum over items of sums[item][c][which]
void SumItems(const std::vector<double>& sums, const LaneMap& x, int which, float* to) {
  for (int64_t c = 0; to && c < x.channels; ++c) {
    double total = 0;
    for (int64_t n = 0; n < x.batch; ++n) total += sums[2 * (n * x.channels + c) + which];
    to[c] = static_cast<float>(total);
  }
}

void Backward(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const GroupNormSpec& spec,
              const GroupNormState& state, float* dgamma, float* dbeta, int threads) {
  std::vector<double> sums(2 * x.batch * x.channels);
  ParallelFor(threads, x.batch * spec.groups, [&](int64_t i) {
    const Group group(x, spec.groups, i);
    const int64_t n = group.item;
    double constant = 0, along = 0;
    for (int64_t c = group.first; c < group.last; ++c) {
      double* const own = &sums[2 * (n * x.channels + c)];
      const Numbers numbers(state, i, c);
      WithActivation<SumPlane>(spec.act.kind, PlaneOf(x, n, c), PlaneOf(dy, n, c), numbers, spec, own);
      constant += numbers.gamma * own[0];
      along += numbers.gamma * own[1];
    }
    const double count = static_cast<double>((group.last - group.first) * x.height * x.width);
    for (int64_t c = group.first; c < group.last; ++c) {
      WithActivation<WriteGradient>(spec.act.kind, PlaneOf(x, n, c), PlaneOf(dy, n, c), PlaneOf(dx, n, c),
                                    Numbers(state, i, c), spec.act.slope, static_cast<float>(constant / count),
                                    static_cast<float>(along / count));
    }
  });
  SumItems(sums, x, 1, dgamma);
  SumItems(sums, x, 0, dbeta);
}

}  // namespace

extern const GroupNormKernels group_norm_kernels;
const GroupNormKernels group_norm_kernels = {Forward, Backward};

}  // namespace LIPFAST_NS
}  // namespace lipfast
