// Runs the kernels of a .cu file on the CPU, one fiber per CUDA thread, for
// correctness only:  g++ -x c++ -include cuda_emulator.h kernel.cu
//
// Blocks run one after another. Inside a block one warp runs as far as it can go
// alone before the next one starts (the least lock-step a GPU may be), in an
// order set by CUDA_EMULATOR_ORDER: 0 forward, 1 reverse, N > 1 random with
// seed N. Shared memory is poisoned with NaN before each block, and asynchronous
// copies land only when they are waited for. So a missing barrier or wait shows
// as a wrong answer in one of the orders; a barrier or shuffle that not every
// named thread reaches is reported as a deadlock.
//
// Limits: x86-64 only; launches and dynamic shared memory through the macros of
// csrc/cuda/launch.cuh; no inline PTX, no tensor cores, no half types; blocks
// never overlap, so races between blocks cannot be seen.
#pragma once
#define LIPFAST_EMULATED 1

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
static inline int2 make_int2(int a, int b) { return {a, b}; }

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

// Saves the callee-saved registers and the stack, and continues on another one.
extern "C" void emulator_switch(void** save_stack, void* load_stack);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace emulator {

enum class Status { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t size, zeros;
};

struct Fiber {
  void* stack_pointer;
  uint3 thread;
  Status status;
  unsigned mask;                          // of the warp barrier it waits at
  uint64_t published;                     // what a shuffle shows to the other lanes
  std::vector<std::vector<Copy>> copies;  // groups; the last one is open
  std::vector<char> stack;
};

struct State {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  void* main_stack;
  int current;
  uint3 block;
  dim3 block_size, grid_size;
  const std::function<void()>* body;
  const char* error;
};
inline State state;

inline void Pause(Status status, unsigned mask = 0) {
  Fiber& fiber = state.fibers[state.current];
  fiber.status = status;
  fiber.mask = mask;
  emulator_switch(&fiber.stack_pointer, state.main_stack);
}

inline void Entry() {
  (*state.body)();
  Pause(Status::kDone);
  abort();
}

inline bool Fail(const char* message) {
  if (state.error == nullptr) {
    state.error = message;
    fprintf(stderr, "cuda_emulator: %s (block %u,%u,%u)\n", message, state.block.x, state.block.y, state.block.z);
  }
  return false;
}

inline void Restart(Fiber& fiber, uint3 thread) {
  fiber.thread = thread;
  fiber.status = Status::kReady;
  fiber.copies.assign(1, {});
  fiber.stack.resize(64 << 10);
  uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack.data()) + fiber.stack.size();
  void** p = reinterpret_cast<void**>(top & ~uintptr_t(15));
  *--p = nullptr;  // entry expects the stack 8 off a multiple of 16
  *--p = reinterpret_cast<void*>(&Entry);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  fiber.stack_pointer = p;
}

// Frees the lanes of warp `first` whose whole mask waits. True if any moved.
inline bool ReleaseWarp(size_t first, size_t threads) {
  bool moved = false;
  const size_t end = std::min(first + 32, threads);
  for (size_t l = first; l < end; ++l) {
    if (state.fibers[l].status != Status::kAtWarpBarrier) continue;
    const unsigned mask = state.fibers[l].mask;
    bool all = mask >> (l - first) & 1;
    for (size_t k = first; k < first + 32; ++k) {
      if (mask >> (k - first) & 1) {
        all = all && k < threads && state.fibers[k].status == Status::kAtWarpBarrier && state.fibers[k].mask == mask;
      }
    }
    for (size_t k = first; all && k < end; ++k) {
      if (mask >> (k - first) & 1) state.fibers[k].status = Status::kReady;
    }
    moved = moved || all;
  }
  return moved;
}

inline bool RunBlock() {
  const size_t threads = size_t(state.block_size.x) * state.block_size.y * state.block_size.z;
  const char* wanted = getenv("CUDA_EMULATOR_ORDER");
  const int order = wanted ? atoi(wanted) : 0;
  std::fill(state.shared.begin(), state.shared.end(), char(0xff));
  state.fibers.resize(threads);
  std::mt19937 random(order + state.block.x * 7919 + state.block.y * 104729);
  std::vector<size_t> lanes, warps;
  for (size_t i = 0; i < threads; ++i) {
    lanes.push_back(i);
    if (i % 32 == 0) warps.push_back(i);
    Restart(state.fibers[i], {unsigned(i % state.block_size.x), unsigned(i / state.block_size.x % state.block_size.y),
                              unsigned(i / state.block_size.x / state.block_size.y)});
  }
  if (order == 1) {
    std::reverse(lanes.begin(), lanes.end());
    std::reverse(warps.begin(), warps.end());
  }
  for (;;) {
    bool moved = false;
    if (order > 1) {
      std::shuffle(lanes.begin(), lanes.end(), random);
      std::shuffle(warps.begin(), warps.end(), random);
    }
    for (size_t warp : warps) {
      for (bool go = true; go && state.error == nullptr;) {
        for (size_t i : lanes) {
          if (i / 32 * 32 != warp) continue;
          if (state.fibers[i].status != Status::kReady) continue;
          state.current = static_cast<int>(i);
          emulator_switch(&state.main_stack, state.fibers[i].stack_pointer);
        }
        go = ReleaseWarp(warp, threads);
        moved = moved || go;
        if (order > 1 && random() % 4 == 0) break;  // leave a warp half way
      }
    }
    if (state.error != nullptr) return false;
    size_t done = 0, waiting = 0, ready = 0;
    for (const Fiber& fiber : state.fibers) {
      done += fiber.status == Status::kDone;
      waiting += fiber.status == Status::kAtBlockBarrier;
      ready += fiber.status == Status::kReady;
    }
    if (done == threads) return true;
    if (waiting + done == threads) {
      for (Fiber& fiber : state.fibers) {
        if (fiber.status == Status::kAtBlockBarrier) {
          fiber.status = Status::kReady;
        }
      }
    } else if (!moved && ready == 0) {
      return Fail(
          "deadlock: a barrier or a *_sync mask that not every named thread "
          "reaches");
    }
  }
}

inline cudaError_t Launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  state.block_size = block;
  state.grid_size = grid;
  state.body = &body;
  state.error = nullptr;
  // Exactly as long as asked for, so that ASan sees one byte too many. Vectors
  // of this size are 16-byte aligned.
  std::vector<char>(shared_bytes).swap(state.shared);
  if (size_t(block.x) * block.y * block.z > 1024 || grid.y > 65535 || grid.z > 65535 || shared_bytes > 227 * 1024 ||
      grid.x * grid.y * grid.z == 0) {
    Fail("bad launch shape");
    return cudaErrorLaunchFailure;
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        state.block = {x, y, z};
        if (!RunBlock()) return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace emulator

#define threadIdx (emulator::state.fibers[emulator::state.current].thread)
#define blockIdx (emulator::state.block)
#define gridDim (emulator::state.grid_size)
#define LIPFAST_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  ((void)(stream), emulator::Launch(grid, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }))
#define LIPFAST_DYNAMIC_SHARED(name) float4* name = reinterpret_cast<float4*>(emulator::state.shared.data())

static inline void __syncthreads() { emulator::Pause(emulator::Status::kAtBlockBarrier); }
static inline void __syncwarp(unsigned mask = ~0u) { emulator::Pause(emulator::Status::kAtWarpBarrier, mask); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "");
  const int me = emulator::state.current;
  memcpy(&emulator::state.fibers[me].published, &value, sizeof value);
  __syncwarp(mask);
  if (!(mask >> (source & 31) & 1)) {
    emulator::Fail("a shuffle reads a lane outside its mask");
  }
  T result;
  memcpy(&result, &emulator::state.fibers[(me & ~31) + (source & 31)].published, sizeof result);
  __syncwarp(mask);
  return result;
}

static inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  if (size != 4 && size != 8 && size != 16) {
    emulator::Fail("an asynchronous copy moves 4, 8 or 16 bytes");
  }
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % size != 0) {
    emulator::Fail("an asynchronous copy is not aligned to its size");
  }
  emulator::state.fibers[emulator::state.current].copies.back().push_back({to, from, size, zeros});
}
static inline void __pipeline_commit() { emulator::state.fibers[emulator::state.current].copies.emplace_back(); }
static inline void __pipeline_wait_prior(size_t pending) {
  auto& groups = emulator::state.fibers[emulator::state.current].copies;
  while (groups.size() - 1 > pending) {
    for (const emulator::Copy& copy : groups.front()) {
      memcpy(copy.to, copy.from, copy.size - copy.zeros);
      memset(static_cast<char*>(copy.to) + copy.size - copy.zeros, 0, copy.zeros);
    }
    groups.erase(groups.begin());
  }
}

static inline int __float_as_int(float value) {
  int bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
static inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
static inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
static inline const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : "emulated error";
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, size_t) {
  return cudaSuccess;
}
using std::max;
using std::min;
