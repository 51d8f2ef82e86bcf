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

// The group of one sheet that is unit i of the work.
struct Group {
  int64_t sheet, first, last;  // channels

  Group(const LaneMap& m, int64_t groups, int64_t i)
      : sheet(i / groups), first(m.channels / groups * (i % groups)), last(m.channels / groups * (i % groups + 1)) {}
};

// One channel of one sheet. Pictures that the sheet lacks have sums of their own, which nothing reads.
LaneMap PlaneOf(const LaneMap& m, int64_t n, int64_t c) {
  LaneMap plane = Plane(m, c);
  plane.data = m.At(n, c);
  plane.batch = 1;
  plane.missing = 0;
  return plane;
}

// The channels of a group as a batch of planes.
LaneMap PlanesOf(const LaneMap& m, const Group& group) {
  LaneMap planes = PlaneOf(m, group.sheet, group.first);
  planes.batch = group.last - group.first;
  planes.batch_stride = m.channel_stride;
  return planes;
}

// A number for each picture of a sheet, in all its lanes.
struct OfPictures {
  double at[kLanes] = {};

  V Load() const {
    alignas(64) float lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = static_cast<float>(at[l]);
    return LIPFAST_NS::Load(lanes);
  }
};

// sums[k] += for each picture the sum of term k over its pixels.
template <int kSums, class AtRow>
void SumEachPicture(const LaneMap& m, const LivePixelMask& live, const AtRow& at_row, OfPictures* sums) {
  const int64_t blocks = m.grid * m.grid;
  SumChannelLanes<kSums>(m, live, at_row, [&](int k, V part) {
    double* const at = sums[k].at;
    alignas(64) float each[kLanes];
    Store(each, part);
    const double whole = blocks == kLanes ? Sum(part) : 0.0f;
    for (int64_t l = 0; l < kLanes; l += blocks) {
      double sum = whole;
      for (int64_t i = 0; blocks < kLanes && i < blocks; ++i) sum += each[l + i];
      for (int64_t i = 0; i < blocks; ++i) at[l + i] += sum;
    }
  });
}

// What normalises a channel of unit i, and undoes it.
struct Numbers {
  V mean, inverse;
  Affine affine;

  Numbers(const GroupNormState& state, int64_t i, int64_t c)
      : mean(LoadU(state.mean + i * kLanes)),
        inverse(LoadU(state.inverse_deviation + i * kLanes)),
        affine(ScaleAndShift(state.gamma, state.beta, c, mean, inverse)) {}
};

void FindMoments(const LaneMap& planes, const GroupNormSpec& spec, float* means, float* inverses) {
  const double count = static_cast<double>(planes.batch * planes.height * planes.width);
  OfPictures sum, squares[2];
  SumEachPicture<1>(planes, spec.live, PixelsOf(planes, 0), &sum);
  for (double& mean : sum.at) mean /= count;
  SumEachPicture<2>(planes, spec.live, DeviationsOf(planes, 0, sum.Load()), squares);
  for (int l = 0; l < kLanes; ++l) {
    const double variance = Variance(squares[0].at[l], squares[1].at[l], count);
    means[l] = static_cast<float>(sum.at[l]);
    inverses[l] = static_cast<float>(1.0 / sqrt(variance + spec.epsilon));
  }
}

void Forward(const LaneMap& x, const LaneMap& y, const GroupNormSpec& spec, const GroupNormState& state, HaloSpec halo,
             int threads) {
  const HaloFiller filler(y, halo.padding, halo.pad);
  ParallelFor(threads, x.batch * spec.groups, [&](int64_t i) {
    const Group group(x, spec.groups, i);
    FindMoments(PlanesOf(x, group), spec, state.mean + i * kLanes, state.inverse_deviation + i * kLanes);
    for (int64_t c = group.first; c < group.last; ++c) {
      const LaneMap from = PlaneOf(x, group.sheet, c), to = PlaneOf(y, group.sheet, c);
      WithActivation<NormaliseChannel>(spec.act.kind, from, to, 0, Numbers(state, i, c).affine, spec.act.slope);
      if (halo.fill) filler.Fill(y.At(group.sheet, c));
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

// sums: of the gradient before the activation, and of its product with the normalised value.
template <Activation kAct>
struct SumPlane {
  static void Run(const LaneMap& x, const LaneMap& dy, const Numbers& numbers, const GroupNormSpec& spec,
                  OfPictures* sums) {
    SumEachPicture<2>(x, spec.live, GradientTerms(PlaneGradient<kAct>(x, dy, numbers, spec.act.slope)), sums);
  }
};

// dx = inverse_deviation * (gamma * g - constant - along * normalised)
template <Activation kAct>
struct WriteGradient {
  static void Run(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const Numbers& numbers, float slope,
                  V constant, V along) {
    const PlaneGradient<kAct> gradient(x, dy, numbers, slope);
    const V scale = numbers.affine.scale, minus = Sub(Zero(), numbers.inverse);
    const V less = Mul(minus, constant), tilt = Mul(minus, along);
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

// The sum over the pictures of a sheet.
double Total(const OfPictures& sums, int64_t grid) {
  double total = 0;
  for (int64_t l = 0; l < kLanes; l += grid * grid) total += sums.at[l];
  return total;
}

// to[c] = the sum over sheets of sums[sheet][c][which]
void SumSheets(const std::vector<double>& sums, const LaneMap& x, int which, float* to) {
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
    const int64_t n = group.sheet;
    const double count = static_cast<double>((group.last - group.first) * x.height * x.width);
    OfPictures constant, along;
    for (int64_t c = group.first; c < group.last; ++c) {
      OfPictures own[2];
      WithActivation<SumPlane>(spec.act.kind, PlaneOf(x, n, c), PlaneOf(dy, n, c), Numbers(state, i, c), spec, &own[0]);
      const double gamma = state.gamma ? state.gamma[c] : 1.0;
      for (int l = 0; l < kLanes; ++l) {
        constant.at[l] += gamma * own[0].at[l] / count;
        along.at[l] += gamma * own[1].at[l] / count;
      }
      for (int k = 0; k < 2; ++k) sums[2 * (n * x.channels + c) + k] = Total(own[k], x.grid);
    }
    for (int64_t c = group.first; c < group.last; ++c) {
      WithActivation<WriteGradient>(spec.act.kind, PlaneOf(x, n, c), PlaneOf(dy, n, c), PlaneOf(dx, n, c),
                                    Numbers(state, i, c), spec.act.slope, constant.Load(), along.Load());
    }
  });
  SumSheets(sums, x, 1, dgamma);
  SumSheets(sums, x, 0, dbeta);
}

}  // namespace

extern const GroupNormKernels group_norm_kernels;
const GroupNormKernels group_norm_kernels = {Forward, Backward};

}  // namespace LIPFAST_NS
}  // namespace lipfast
