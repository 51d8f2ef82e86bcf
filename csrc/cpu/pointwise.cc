#include "cpu/pointwise.h"

#include "cpu/activation.h"
#include "cpu/plane_sum.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// body(n, c, row) for every row of every plane; a plane is one chunk.
template <class Body>
void ForEachRow(const LaneMap& m, int threads, const Body& body) {
  ParallelFor(threads, m.batch * m.channels, [&](int64_t i) {
    for (int64_t row = 0; row < m.block_h; ++row) body(i / m.channels, i % m.channels, row);
  });
}

template <Activation kAct>
struct Activate {
  static void Run(const LaneMap& x, const LaneMap& y, float slope, int threads) {
    const V low = Set(slope);
    ForEachRow(x, threads, [&](int64_t n, int64_t c, int64_t row) {
      const float* in = x.At(n, c, row);
      float* out = y.At(n, c, row);
      for (int64_t i = 0; i < x.block_w * kLanes; i += kLanes) Store(out + i, Act<kAct>(Load(in + i), low));
    });
  }
};

template <Activation kAct>
struct ActivateBackward {
  static void Run(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, float slope, bool accumulate, int threads) {
    const V low = Set(slope);
    ForEachRow(x, threads, [&](int64_t n, int64_t c, int64_t row) {
      const float* in = x.At(n, c, row);
      const float* gradient = dy.At(n, c, row);
      float* out = dx.At(n, c, row);
      for (int64_t i = 0; i < x.block_w * kLanes; i += kLanes) {
        const V change = Mul(Load(gradient + i), ActSlope<kAct>(Load(in + i), low));
        Put(out + i, change, accumulate);
      }
    });
  }
};

void CallActivate(const LaneMap& x, const LaneMap& y, ActivationSpec act, int threads) {
  WithActivation<Activate>(act.kind, x, y, act.slope, threads);
}

void CallActivateBackward(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, ActivationSpec act, bool accumulate,
                          int threads) {
  WithActivation<ActivateBackward>(act.kind, x, dy, dx, act.slope, accumulate, threads);
}

// Whether `one` has a number for each plane of `map`, which has several.
bool IsOfPlanes(const LaneMap& one, const LaneMap& map) {
  return one.height == 1 && one.width == 1 && (map.height > 1 || map.width > 1);
}

// The channel of `one` that goes with channel c of a map that has several, or as many.
int64_t ChannelOf(const LaneMap& one, int64_t c) { return one.channels == 1 ? 0 : c; }

void Combine(const LaneMap& a, float a_scale, const LaneMap* b, float b_scale, float shift, const LaneMap& y,
             int threads) {
  const bool of_planes = b && IsOfPlanes(*b, a);
  const V as = Set(a_scale), bs = Set(b_scale), base = Set(shift);
  ForEachRow(a, threads, [&](int64_t n, int64_t c, int64_t row) {
    const float* first = a.At(n, c, row);
    const float* second = b && !of_planes ? b->At(n, ChannelOf(*b, c), row) : nullptr;
    const V start = of_planes ? Fma(bs, SpreadPictures(b->At(n, c), a.grid), base) : base;
    float* out = y.At(n, c, row);
    for (int64_t i = 0; i < a.block_w * kLanes; i += kLanes) {
      V sum = Fma(as, Load(first + i), start);
      if (second) sum = Fma(bs, Load(second + i), sum);
      Store(out + i, sum);
    }
  });
}

void Multiply(const LaneMap& a, const LaneMap& b, const LaneMap& y, bool accumulate, int threads) {
  const bool factor = IsOfPlanes(b, a);
  ForEachRow(a, threads, [&](int64_t n, int64_t c, int64_t row) {
    const float* first = a.At(n, c, row);
    const float* second = b.At(n, ChannelOf(b, c), factor ? 0 : row);
    const V same = factor ? SpreadPictures(second, a.grid) : Zero();
    float* out = y.At(n, c, row);
    for (int64_t i = 0; i < a.block_w * kLanes; i += kLanes) {
      const V product = Mul(Load(first + i), factor ? same : Load(second + i));
      Put(out + i, product, accumulate);
    }
  });
}

// The sums of a * b in each lane of a plane; b null: of a.
V DotLanes(const LaneMap& a, const LaneMap* b, const LivePixelMask& live, int64_t n, int64_t c) {
  return SumLanes(a, live, [&](int64_t row, int64_t i) {
    const V v = Load(a.At(n, c, row) + i);
    return b ? Mul(v, Load(b->At(n, c, row) + i)) : v;
  });
}

void DotPlanes(const LaneMap& a, const LaneMap* b, const LaneMap& y, const LivePixelMask& live, bool accumulate,
               int threads) {
  ParallelFor(threads, a.batch * a.channels, [&](int64_t i) {
    const int64_t n = i / a.channels, c = i % a.channels;
    Put(y.At(n, c), SumPictures(DotLanes(a, b, live, n, c), a.grid), accumulate);
  });
}

void Total(const LaneMap& a, const LaneMap* b, const LivePixelMask& live, float* partial, float* sum, int threads) {
  ParallelFor(threads, a.batch * a.channels,
              [&](int64_t i) { partial[i] = Sum(DotLanes(a, b, live, i / a.channels, i % a.channels)); });
  SumPlanes(partial, a, 0, sum);
}

// body(n, row, col) for every pixel vector of every image; a row is one chunk.
template <class Body>
void ForEachPixel(const LaneMap& m, int threads, const Body& body) {
  ParallelFor(threads, m.batch * m.block_h, [&](int64_t i) {
    for (int64_t col = 0; col < m.block_w; ++col) body(i / m.block_h, i % m.block_h, col);
  });
}

// 1 / sqrt(mean over channels of x^2 + epsilon)
V InverseNorm(const LaneMap& x, int64_t n, int64_t row, int64_t col, float epsilon) {
  V squares = Zero();
  for (int64_t c = 0; c < x.channels; ++c) {
    const V v = Load(x.At(n, c, row, col));
    squares = Fma(v, v, squares);
  }
  return Div(Set(1.0f), Sqrt(Fma(squares, Set(1.0f / static_cast<float>(x.channels)), Set(epsilon))));
}

void PixelNorm(const LaneMap& x, const LaneMap& y, float epsilon, int threads) {
  ForEachPixel(x, threads, [&](int64_t n, int64_t row, int64_t col) {
    const V scale = InverseNorm(x, n, row, col, epsilon);
    for (int64_t c = 0; c < x.channels; ++c) Store(y.At(n, c, row, col), Mul(Load(x.At(n, c, row, col)), scale));
  });
}

void PixelNormBackward(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, float epsilon, bool accumulate,
                       int threads) {
  ForEachPixel(x, threads, [&](int64_t n, int64_t row, int64_t col) {
    const V scale = InverseNorm(x, n, row, col, epsilon);
    V product = Zero();
    for (int64_t c = 0; c < x.channels; ++c) {
      product = Fma(Load(x.At(n, c, row, col)), Load(dy.At(n, c, row, col)), product);
    }
    const V along = Mul(Mul(product, Set(-1.0f / static_cast<float>(x.channels))), Mul(scale, Mul(scale, scale)));
    for (int64_t c = 0; c < x.channels; ++c) {
      float* out = dx.At(n, c, row, col);
      const V change = Fma(along, Load(x.At(n, c, row, col)), Mul(Load(dy.At(n, c, row, col)), scale));
      Put(out, change, accumulate);
    }
  });
}

}  // namespace

extern const PointwiseKernels pointwise_kernels;
const PointwiseKernels pointwise_kernels = {CallActivate, CallActivateBackward, Combine, Multiply, DotPlanes, Total,
                                            PixelNorm,    PixelNormBackward};

}  // namespace LIPFAST_NS
}  // namespace lipfast
