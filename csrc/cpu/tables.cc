// The kernel tables of every family, one line each.
#include "cpu/isa.h"
#include "cpu/lanes.h"

namespace lipfast {

LIPFAST_KERNEL_TABLE(LaneKernels, lane_kernels)

}  // namespace lipfast
