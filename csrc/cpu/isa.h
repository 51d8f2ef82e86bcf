// Which instruction set the kernels use: chosen once, from CPUID.
//
// LIPFAST_ISA=avx512|avx2|plain overrides. A kernel family declares a table of
// function pointers and gets the one of the chosen target with
//   const ConvKernels& k = Kernels<ConvKernels>();
#pragma once

#include <cstdint>

namespace lipfast {

enum class Isa { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// True when both this build and this CPU have the instruction set.
bool IsaAvailable(Isa isa);

// "plain", "avx2" or "avx512".
const char* IsaName(Isa isa);

// The instruction set in use. The first call reads LIPFAST_ISA; a name that is
// unknown or cannot run here throws std::runtime_error naming it.
Isa ActiveIsa();

// Changes it, for tests that loop over all. Not while a kernel runs.
void SetIsa(Isa isa);

// Bytes of a core's first data cache, of which blocks of work are cut, and so the order of sums. The system is
// asked where there is AVX-512; elsewhere a CPU may have cores of two kinds, and the answer would depend on which
// of them is asked: 32 KB.
int64_t FirstLevelBytes();

// Whether a core bears what comes from beyond its first level: lines fetched ahead leave it enough places for lines
// that its loads wait for, and operands may exceed 32 KB a little. So it was on Zen 4 and on CPUs with 48 KB of first
// level (Emerald Rapids, Zen 5), and not on Cascade Lake.
bool SecondLevelIsNear();

// Whether the CPU runs AVX-512 in two halves, as Zen 4 does: one multiply-add a clock, whose operands the second level
// delivers in time, and shuffles on two pipes.
bool Avx512InHalves();

// Each family specialises this in its .cc, once per target built.
template <class Table>
const Table& KernelsFor(Isa isa);

template <class Table>
const Table& Kernels() {
  return KernelsFor<Table>(ActiveIsa());
}

// Defines KernelsFor<Table> from the variable `name` that every target's
// namespace holds. Used once per family, in a source built once.
#if defined(__x86_64__)
#define LIPFAST_KERNEL_TABLE(Table, name)                                                     \
  namespace plain {                                                                           \
  extern const Table name;                                                                    \
  }                                                                                           \
  namespace avx2 {                                                                            \
  extern const Table name;                                                                    \
  }                                                                                           \
  namespace avx512 {                                                                          \
  extern const Table name;                                                                    \
  }                                                                                           \
  template <>                                                                                 \
  const Table& KernelsFor<Table>(Isa isa) {                                                   \
    return isa == Isa::kAvx512 ? avx512::name : isa == Isa::kAvx2 ? avx2::name : plain::name; \
  }
#else
#define LIPFAST_KERNEL_TABLE(Table, name) \
  namespace plain {                       \
  extern const Table name;                \
  }                                       \
  template <>                             \
  const Table& KernelsFor<Table>(Isa) {   \
    return plain::name;                   \
  }
#endif

}  // namespace lipfast
