// The few spellings that differ between nvcc and the CPU emulator
// (tests/gpu/emulator/cuda_emulator.h, which defines LIPFAST_EMULATED and its
// own versions before this file is read).
#ifndef LIPFAST_CSRC_CUDA_LAUNCH_CUH_
#define LIPFAST_CSRC_CUDA_LAUNCH_CUH_

#ifndef LIPFAST_EMULATED
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#define LIPFAST_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  (kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__), cudaGetLastError())
#define LIPFAST_DYNAMIC_SHARED(name) extern __shared__ float4 name[]
#endif

// A lambda that captures register arrays must be inlined: left as a function it
// would force them into local memory, i.e. spill them all.
#define LIPFAST_INLINE __attribute__((always_inline))

#endif  // LIPFAST_CSRC_CUDA_LAUNCH_CUH_
