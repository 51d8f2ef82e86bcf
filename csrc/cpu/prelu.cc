#include "cpu/prelu.h"

#include "cpu/plane_sum.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

void Forward(const LaneMap& x, const LaneMap& y, const PreluSpec& spec, int threads) {
  ParallelFor(threads, x.batch * x.channels, [&](int64_t i) {
    const int64_t n = i / x.channels, c = i % x.channels;
    const V slope = Set(spec.slopes[c * spec.step]);
    for (int64_t row = 0; row < x.block_h; ++row) {
      const float* in = x.At(n, c, row);
      float* out = y.At(n, c, row);
      for (int64_t at = 0; at < x.block_w * kLanes; at += kLanes) {
        const V v = Load(in + at);
        Store(out + at, IfPositive(v, v, Mul(v, slope)));
      }
    }
  });
}

void Backward(const LaneMap& x, const LaneMap& dy, const LaneMap* dx, const PreluSpec& spec, const LivePixelMask& live,
              bool accumulate, float* dslopes, float* partial, int threads) {
  ParallelFor(threads, x.batch * x.channels, [&](int64_t i) {
    const int64_t n = i / x.channels, c = i % x.channels;
    const V slope = Set(spec.slopes[c * spec.step]);
    const V below = SumLanes(x, live, [&](int64_t row, int64_t at) {
      const V v = Load(x.At(n, c, row) + at), gradient = Load(dy.At(n, c, row) + at);
      if (dx) Put(dx->At(n, c, row) + at, IfPositive(v, gradient, Mul(gradient, slope)), accumulate);
      return IfPositive(v, Zero(), Mul(gradient, v));
    });
    if (dslopes) partial[i] = Sum(below);
  });
  if (dslopes) SumPlanes(partial, x, spec.step, dslopes);
}

}  // namespace

extern const PreluKernels prelu_kernels;
const PreluKernels prelu_kernels = {Forward, Backward};

}  // namespace LIPFAST_NS
}  // namespace lipfast
