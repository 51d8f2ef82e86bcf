// The kernel tables of every family, one line each.
#include "cpu/adam.h"
#include "cpu/attention.h"
#include "cpu/ceiling.h"
#include "cpu/channel_attention.h"
#include "cpu/channels.h"
#include "cpu/fingerprint.h"
#include "cpu/finish.h"
#include "cpu/group_norm.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/layer_norm.h"
#include "cpu/noise.h"
#include "cpu/norm.h"
#include "cpu/pair.h"
#include "cpu/pointwise.h"
#include "cpu/pool2d.h"
#include "cpu/prelu.h"
#include "cpu/resample.h"
#include "cpu/response_norm.h"
#include "cpu/select.h"
#include "cpu/taps.h"
#include "cpu/winograd.h"

namespace lipfast {

LIPFAST_KERNEL_TABLE(AttentionKernels, attention_kernels)
LIPFAST_KERNEL_TABLE(CeilingKernels, ceiling_kernels)
LIPFAST_KERNEL_TABLE(ChannelAttentionKernels, channel_attention_kernels)
LIPFAST_KERNEL_TABLE(ChannelKernels, channel_kernels)
LIPFAST_KERNEL_TABLE(FingerprintKernels, fingerprint_kernels)
LIPFAST_KERNEL_TABLE(FinishKernels, finish_kernels)
LIPFAST_KERNEL_TABLE(LaneKernels, lane_kernels)
LIPFAST_KERNEL_TABLE(TapKernels, tap_kernels)
LIPFAST_KERNEL_TABLE(WinogradKernels, winograd_kernels)
LIPFAST_KERNEL_TABLE(FiveTapWinogradKernels, five_tap_winograd_kernels)
LIPFAST_KERNEL_TABLE(StridedWinogradKernels, strided_winograd_kernels)
LIPFAST_KERNEL_TABLE(SelectKernels, select_kernels)
LIPFAST_KERNEL_TABLE(StepKernels, step_kernels)
LIPFAST_KERNEL_TABLE(NoiseKernels, noise_kernels)
LIPFAST_KERNEL_TABLE(NormKernels, norm_kernels)
LIPFAST_KERNEL_TABLE(GroupNormKernels, group_norm_kernels)
LIPFAST_KERNEL_TABLE(LayerNormKernels, layer_norm_kernels)
LIPFAST_KERNEL_TABLE(PairKernels, pair_kernels)
LIPFAST_KERNEL_TABLE(PointwiseKernels, pointwise_kernels)
LIPFAST_KERNEL_TABLE(PoolKernels, pool_kernels)
LIPFAST_KERNEL_TABLE(PreluKernels, prelu_kernels)
LIPFAST_KERNEL_TABLE(ResampleKernels, resample_kernels)
LIPFAST_KERNEL_TABLE(ResponseNormKernels, response_norm_kernels)

const WinogradKernels& WinogradKernelsOf(int64_t kernel, int64_t stride) {
  if (stride == 2) return Kernels<StridedWinogradKernels>().kernels;
  return kernel == 5 ? Kernels<FiveTapWinogradKernels>().kernels : Kernels<WinogradKernels>();
}

}  // namespace lipfast
