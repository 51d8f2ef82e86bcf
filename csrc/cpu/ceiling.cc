#include "cpu/ceiling.h"

#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// Enough independent chains to cover a multiply-add's latency of 4 cycles on 2
// ports, few enough to stay in registers.
constexpr int kChains = LIPFAST_TARGET == 0 ? kRegisters / 2 : kRegisters * 3 / 4;
constexpr int kStepsPerRound = 64;

float FmaBurst(int64_t rounds) {
  V chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = Set(static_cast<float>(i));
  const V scale = Set(0.999f), shift = Set(0.001f);  // stays near 1: no infinity, no denormal
  for (int64_t round = 0; round < rounds; ++round) {
    for (int step = 0; step < kStepsPerRound; ++step) {
      LIPFAST_UNROLL
      for (int i = 0; i < kChains; ++i) chain[i] = Fma(chain[i], scale, shift);
    }
  }
  V sum = chain[0];
  for (int i = 1; i < kChains; ++i) sum = Add(sum, chain[i]);
  return Sum(sum);
}

void Copy(const float* from, float* to, int64_t vectors) {
  for (int64_t i = 0; i < vectors * kLanes; i += kLanes) Store(to + i, Load(from + i));
}

}  // namespace

extern const CeilingKernels ceiling_kernels;
const CeilingKernels ceiling_kernels = {FmaBurst, int64_t{2} * kStepsPerRound * kChains * kLanes, Copy};

}  // namespace LIPFAST_NS
}  // namespace lipfast
