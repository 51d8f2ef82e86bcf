// Sums, moments and normalisation of single channels, which BatchNorm and GroupNorm
// are made of; for kernel sources only.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "cpu/lanes.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

// Vectors summed in floats before they go on in double: keeps the rounding error of
// a sum near that of 64 additions.
constexpr int64_t kFlush = 256;
constexpr int kChains = 4;  // independent additions, to hide their latency

// One in the lanes of pictures that the last sheet has, zero in those of missing ones.
inline V LastPictures(const LaneMap& m) {
  alignas(64) float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = PlaceOf(l, m.grid).picture < m.sheet() - m.missing ? 1.0f : 0.0f;
  return Load(lanes);
}

// take(k, lanes): a part of the sum of each lane over all live pixels of channel c of term k. at_row(n, row) gives a
// callable (col, V* terms) that writes kSums terms.
template <int kSums, class AtRow, class Take>
void SumChannelLanes(const LaneMap& m, const LivePixelMask& live, const AtRow& at_row, const Take& take) {
  V part[kSums][kChains];
  const auto clear = [&] {
    for (int k = 0; k < kSums; ++k) {
      for (int j = 0; j < kChains; ++j) part[k][j] = Zero();
    }
  };
  const auto flush = [&] {
    for (int k = 0; k < kSums; ++k) {
      take(k, Add(Add(part[k][0], part[k][1]), Add(part[k][2], part[k][3])));
    }
    clear();
  };
  clear();
  const V last = LastPictures(m);
  int64_t pending = 0;
  for (int64_t n = 0; n < m.batch; ++n) {
    const bool partial = m.missing > 0 && n + 1 == m.batch;
    for (int64_t row = 0; row < m.block_h; ++row) {
      const auto at = at_row(n, row);
      V term[kSums];
      int64_t col = 0;
      if (!live.rows && !partial) {
        for (; col + kChains <= m.block_w; col += kChains) {
          LIPFAST_UNROLL
          for (int j = 0; j < kChains; ++j) {
            at(col + j, term);
            for (int k = 0; k < kSums; ++k) part[k][j] = Add(part[k][j], term[k]);
          }
        }
      }
      for (; col < m.block_w; ++col) {
        at(col, term);
        V alive = partial ? last : Set(1.0f);
        if (live.rows) alive = Mul(alive, Mul(LoadU(live.rows + row * kLanes), LoadU(live.columns + col * kLanes)));
        for (int k = 0; k < kSums; ++k) part[k][0] = Fma(term[k], alive, part[k][0]);
      }
      pending += m.block_w;
      if (pending >= kFlush) {
        flush();
        pending = 0;
      }
    }
  }
  flush();
}

// sums[k] += the sum over all live pixels of channel c of term k.
template <int kSums, class AtRow>
void SumChannel(const LaneMap& m, const LivePixelMask& live, const AtRow& at_row, double* sums) {
  SumChannelLanes<kSums>(m, live, at_row, [&](int k, V lanes) { sums[k] += Sum(lanes); });
}

// The rows of channel c: its pixels.
inline auto PixelsOf(const LaneMap& x, int64_t c) {
  return [&x, c](int64_t n, int64_t row) {
    return [in = x.At(n, c, row)](int64_t col, V* term) { term[0] = Load(in + col * kLanes); };
  };
}

// How far they are from a centre, and the squares of that.
inline auto DeviationsOf(const LaneMap& x, int64_t c, V centre) {
  return [&x, c, centre](int64_t n, int64_t row) {
    return [in = x.At(n, c, row), centre](int64_t col, V* term) {
      term[0] = Sub(Load(in + col * kLanes), centre);
      term[1] = Mul(term[0], term[0]);
    };
  };
}

struct Moments {
  double mean, variance;  // biased
};

// From the sums of `count` deviations and their squares. The mean rounded to float is off by the mean deviation; undo
// what that adds.
inline double Variance(double deviations, double squares, double count) {
  const double off = deviations / count;
  const double variance = squares / count - off * off;
  return variance > 0 ? variance : variance == variance ? 0.0 : variance;
}

inline Moments ChannelMoments(const LaneMap& x, int64_t c, const LivePixelMask& live) {
  const double count = static_cast<double>(x.pixels());
  double sum = 0;
  SumChannel<1>(x, live, PixelsOf(x, c), &sum);
  const double mean = sum / count;
  double squares[2] = {0, 0};
  SumChannel<2>(x, live, DeviationsOf(x, c, Set(static_cast<float>(mean))), squares);
  return {mean, Variance(squares[0], squares[1], count)};
}

// gamma * (x - mean) * inverse + beta = scale * x + shift, lane by lane
struct Affine {
  V scale, shift;
};

// Of channel c; a null gamma is 1, a null beta 0.
inline Affine ScaleAndShift(const float* gamma, const float* beta, int64_t c, V mean, V inverse) {
  const V scale = Mul(Set(gamma ? gamma[c] : 1.0f), inverse);
  return {scale, Sub(Set(beta ? beta[c] : 0.0f), Mul(mean, scale))};
}

// One channel of a map.
inline LaneMap Plane(const LaneMap& m, int64_t c) {
  LaneMap plane = m;
  plane.data = m.At(0, c);
  plane.channels = 1;
  return plane;
}

// While one channel is written, the next one, which the same thread takes next, is
// fetched: a core alone does not keep enough loads from beyond its cache in flight.
struct Upcoming {
  int64_t step;  // floats to the same vector of the next channel; 0 at the last one

  // Channel c of all those of `whole`, in the strides of m.
  Upcoming(const LaneMap& m, const LaneMap& whole, int64_t c) : step(c + 1 < whole.channels ? m.channel_stride : 0) {}
  void Fetch(const float* here) const { __builtin_prefetch(here + step, 0, 2); }
  void FetchToWrite(const float* here) const { __builtin_prefetch(here + step, 1, 2); }
};

template <Activation kAct>
struct NormaliseChannel {
  static void Run(const LaneMap& x, const LaneMap& y, int64_t c, Affine affine, float slope) {
    const V scale = affine.scale, shift = affine.shift, low = Set(slope);
    const Upcoming next(x, x, c), next_y(y, y, c);
    for (int64_t n = 0; n < x.batch; ++n) {
      for (int64_t row = 0; row < x.block_h; ++row) {
        const float* in = x.At(n, c, row);
        float* out = y.At(n, c, row);
        for (int64_t i = 0; i < x.block_w * kLanes; i += kLanes) {
          next.Fetch(in + i);
          next_y.FetchToWrite(out + i);
          Store(out + i, Act<kAct>(Fma(Load(in + i), scale, shift), low));
        }
      }
    }
  }
};

// From a norm's input: the activation's slope and the normalised value.
template <Activation kAct>
struct FromInput {
  V scale, shift, low, mean, inverse;

  FromInput(Affine affine, float slope, V centre, V inverse_deviation)
      : scale(affine.scale), shift(affine.shift), low(Set(slope)), mean(centre), inverse(inverse_deviation) {}
  V Slope(V in) const { return ActSlope<kAct>(Fma(in, scale, shift), low); }
  V Normalised(V in) const { return Mul(Sub(in, mean), inverse); }
};

// The gradient before the activation at one row, and the normalised value.
template <class Recover, Activation kAct, bool kTwo>
struct RowGradient {
  const float *x, *dy, *dy2;
  const Recover& recover;

  void At(int64_t col, V* gradient, V* normalised) const {
    const V in = Load(x + col * kLanes);
    V g = Load(dy + col * kLanes);
    if (kTwo) g = Add(g, Load(dy2 + col * kLanes));
    *gradient = kAct == Activation::kNone ? g : Mul(g, recover.Slope(in));
    *normalised = recover.Normalised(in);
  }
};

// The gradient before the activation, and its product with the normalised value. row_gradient(n, row) gives a
// RowGradient.
template <class AtRow>
auto GradientTerms(const AtRow& row_gradient) {
  return [row_gradient](int64_t n, int64_t row) {
    return [at = row_gradient(n, row)](int64_t col, V* term) {
      V g, normalised;
      at.At(col, &g, &normalised);
      term[0] = g;
      term[1] = Mul(g, normalised);
    };
  };
}

}  // namespace LIPFAST_NS
}  // namespace lipfast
