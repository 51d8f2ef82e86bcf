// The kernel tables of every family, one line each.
#include "cpu/adam.h"
#include "cpu/ceiling.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/select.h"
#include "cpu/taps.h"
#include "cpu/winograd.h"

namespace lipfast {

LIPFAST_KERNEL_TABLE(CeilingKernels, ceiling_kernels)
LIPFAST_KERNEL_TABLE(LaneKernels, lane_kernels)
LIPFAST_KERNEL_TABLE(TapKernels, tap_kernels)
LIPFAST_KERNEL_TABLE(WinogradKernels, winograd_kernels)
LIPFAST_KERNEL_TABLE(SelectKernels, select_kernels)
LIPFAST_KERNEL_TABLE(StepKernels, step_kernels)

}  // namespace lipfast
