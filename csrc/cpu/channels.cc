#include "cpu/channels.h"

#include "cpu/channel_pieces.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

struct DotPiece {
  const LaneMap &a, *b;
  float scale;
  const LaneMap& y;
  bool accumulate;

  template <int kVectors>
  void Of(const Place& at) const {
    const Columns first(a, at), second(b ? *b : a, at), out(y, at);
    V sums[kVectors];
    if (b) {
      SumChannels<kVectors>(a.channels, [&](int64_t c, int k) { return Mul(first(c, k), second(c, k)); }, sums);
    } else {
      SumChannels<kVectors>(a.channels, first, sums);
    }
    for (int k = 0; k < kVectors; ++k) Put(out.At(0, k), Mul(sums[k], Set(scale)), accumulate);
  }
};

void Dot(const LaneMap& a, const LaneMap* b, float scale, const LaneMap& y, bool accumulate, int threads) {
  ForEachPiece(a, threads, DotPiece{a, b, scale, y, accumulate});
}

template <int kVectors>
void LargestOf(const Columns& x, int64_t channels, V* largest) {
  for (int k = 0; k < kVectors; ++k) largest[k] = x(0, k);
  for (int64_t c = 1; c < channels; ++c) {
    LIPFAST_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const V v = x(c, k);
      largest[k] = IfLarger(v, largest[k], v, largest[k]);
    }
  }
}

struct LargestPiece {
  const LaneMap &x, &y;

  template <int kVectors>
  void Of(const Place& at) const {
    const Columns out(y, at);
    V largest[kVectors];
    LargestOf<kVectors>(Columns(x, at), x.channels, largest);
    for (int k = 0; k < kVectors; ++k) Store(out.At(0, k), largest[k]);
  }
};

void Largest(const LaneMap& x, const LaneMap& y, int threads) { ForEachPiece(x, threads, LargestPiece{x, y}); }

struct LargestBackwardPiece {
  const LaneMap &x, &dy, &dx;
  bool shared, accumulate;

  template <int kVectors>
  void Of(const Place& at) const {
    const Columns in(x, at), gradient(dy, at), out(dx, at);
    V largest[kVectors], left[kVectors];
    LargestOf<kVectors>(in, x.channels, largest);
    if (shared)
      SumChannels<kVectors>(x.channels, [&](int64_t c, int k) { return IsLargest(in(c, k), largest[k]); }, left);
    for (int k = 0; k < kVectors; ++k) left[k] = shared ? Div(gradient(0, k), left[k]) : gradient(0, k);
    for (int64_t c = 0; c < x.channels; ++c) {
      LIPFAST_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        const V v = in(c, k);
        Put(out.At(c, k), IfLarger(largest[k], v, Zero(), left[k]), accumulate);
        if (!shared) left[k] = IfLarger(largest[k], v, left[k], Zero());
      }
    }
  }

  static V IsLargest(V v, V largest) { return IfLarger(largest, v, Zero(), Set(1.0f)); }
};

void LargestBackward(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, bool shared, bool accumulate,
                     int threads) {
  ForEachPiece(x, threads, LargestBackwardPiece{x, dy, dx, shared, accumulate});
}

}  // namespace

extern const ChannelKernels channel_kernels;
const ChannelKernels channel_kernels = {Dot, Largest, LargestBackward};

}  // namespace LIPFAST_NS
}  // namespace lipfast
