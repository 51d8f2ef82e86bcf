#include "cpu/finish.h"

#include "cpu/activation.h"
#include "cpu/halo.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

template <Activation kAct>
struct FinishPlane {
  static void Run(const LaneMap& x, const LaneMap* residual, const LaneMap* factor, const LaneMap& y, int64_t n,
                  int64_t c, FinishAffine affine, float slope) {
    const V scale = Set(affine.scale), shift = Set(affine.shift), low = Set(slope);
    const int64_t width = x.block_w * kLanes;
    for (int64_t row = 0; row < x.block_h; ++row) {
      const float* in = x.At(n, c, row);
      const float* add = residual ? residual->At(n, c, row) : nullptr;
      const float* times = factor ? factor->At(n, c, row) : nullptr;
      float* out = y.At(n, c, row);
      for (int64_t i = 0; i < width; i += kLanes) {
        V sum = Fma(Load(in + i), scale, shift);
        if (add) sum = Add(sum, Load(add + i));
        const V made = Act<kAct>(sum, low);
        Store(out + i, times ? Mul(made, Load(times + i)) : made);
      }
    }
  }
};

void Finish(const LaneMap& x, const LaneMap* residual, const LaneMap* factor, const LaneMap& y, const NormNumbers& norm,
            ActivationSpec act, HaloSpec halo, int threads) {
  const HaloFiller filler(y, halo.padding, halo.pad);
  ParallelFor(threads, x.batch * x.channels, [&](int64_t i) {
    const int64_t n = i / x.channels, c = i % x.channels;
    WithActivation<FinishPlane>(act.kind, x, residual, factor, y, n, c, FinishAffineOf(norm, c), act.slope);
    if (halo.fill) filler.Fill(y.At(n, c));
  });
}

}  // namespace

extern const FinishKernels finish_kernels;
const FinishKernels finish_kernels = {Finish};

}  // namespace LIPFAST_NS
}  // namespace lipfast
