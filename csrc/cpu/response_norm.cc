#include "cpu/response_norm.h"

#include "cpu/plane_sum.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// The root of the sum of squares of each picture's plane; 0 in lanes that stand for no picture.
V SizeOf(const LaneMap& x, int64_t n, int64_t c, const LivePixelMask& live) {
  const V squares = SumLanes(x, live, [&](int64_t row, int64_t at) {
    const V v = Load(x.At(n, c, row) + at);
    return Mul(v, v);
  });
  return Sqrt(SumPictures(squares, x.grid));
}

// 1 / (mean over channels of sizes + epsilon)
template <class Sizes>
V InverseMean(int64_t channels, const Sizes& sizes, float epsilon) {
  V total = Zero();
  for (int64_t c = 0; c < channels; ++c) total = Add(total, sizes(c));
  return Div(Set(1.0f), Fma(total, Set(1.0f / static_cast<float>(channels)), Set(epsilon)));
}

void Forward(const LaneMap& x, const LaneMap& y, float epsilon, const LivePixelMask& live, int threads) {
  ParallelFor(threads, x.batch * x.channels, [&](int64_t i) {
    const int64_t n = i / x.channels, c = i % x.channels;
    Store(y.At(n, c), SizeOf(x, n, c, live));
  });
  for (int64_t n = 0; n < y.batch; ++n) {
    const auto size = [&](int64_t c) { return Load(y.At(n, c)); };
    const V inverse = InverseMean(y.channels, size, epsilon);
    for (int64_t c = 0; c < y.channels; ++c) Store(y.At(n, c), Mul(size(c), inverse));
  }
}

// Turns the sizes of a sheet's channels into what x is multiplied by: the gradients of the sizes over the sizes.
void FactorsFromSizes(const LaneMap& dy, int64_t n, float epsilon, float* sizes) {
  const auto size = [&](int64_t c) { return Load(sizes + c * kLanes); };
  const V inverse = InverseMean(dy.channels, size, epsilon);
  V along = Zero();
  for (int64_t c = 0; c < dy.channels; ++c) along = Fma(Load(dy.At(n, c)), size(c), along);
  const V shared = Mul(Mul(along, inverse), Set(1.0f / static_cast<float>(dy.channels)));
  for (int64_t c = 0; c < dy.channels; ++c) {
    const V change = Mul(Sub(Load(dy.At(n, c)), shared), inverse);
    Store(sizes + c * kLanes, IfPositive(size(c), Div(change, size(c)), Zero()));
  }
}

void Backward(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, float epsilon, const LivePixelMask& live,
              bool accumulate, float* partial, int threads) {
  const int64_t planes = x.batch * x.channels;
  ParallelFor(threads, planes,
              [&](int64_t i) { Store(partial + i * kLanes, SizeOf(x, i / x.channels, i % x.channels, live)); });
  for (int64_t n = 0; n < x.batch; ++n) FactorsFromSizes(dy, n, epsilon, partial + n * x.channels * kLanes);
  ParallelFor(threads, planes, [&](int64_t i) {
    const int64_t n = i / x.channels, c = i % x.channels;
    const V factor = SpreadPictures(partial + i * kLanes, x.grid);
    for (int64_t row = 0; row < x.block_h; ++row) {
      const float* in = x.At(n, c, row);
      float* out = dx.At(n, c, row);
      for (int64_t at = 0; at < x.block_w * kLanes; at += kLanes) Put(out + at, Mul(Load(in + at), factor), accumulate);
    }
  });
}

}  // namespace

extern const ResponseNormKernels response_norm_kernels;
const ResponseNormKernels response_norm_kernels = {Forward, Backward};

}  // namespace LIPFAST_NS
}  // namespace lipfast
