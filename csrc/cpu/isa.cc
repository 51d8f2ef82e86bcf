#include "cpu/isa.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lipfast {
namespace {

constexpr Isa kAll[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPlain};  // fastest first

Isa Choose() {
  const char* asked = std::getenv("LIPFAST_ISA");
  for (Isa isa : kAll) {
    if (asked && *asked ? asked == std::string(IsaName(isa)) : IsaAvailable(isa)) {
      if (IsaAvailable(isa)) return isa;
      throw std::runtime_error(std::string("LIPFAST_ISA=") + asked + ": this CPU or build does not have it");
    }
  }
  throw std::runtime_error(std::string("LIPFAST_ISA=") + asked + " is unknown; use avx512, avx2 or plain");
}

std::atomic<int> active{-1};

}  // namespace

bool IsaAvailable(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return isa == Isa::kPlain;
}

const char* IsaName(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "plain"; }

Isa ActiveIsa() {
  int isa = active.load(std::memory_order_acquire);
  if (isa < 0) {
    isa = static_cast<int>(Choose());
    active.store(isa, std::memory_order_release);
  }
  return static_cast<Isa>(isa);
}

int64_t FirstLevelBytes() {
  constexpr int64_t kUsual = 32 << 10;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t told = IsaAvailable(Isa::kAvx512) ? sysconf(_SC_LEVEL1_DCACHE_SIZE) : 0;
  return told > 0 ? told : kUsual;
#else
  return kUsual;
#endif
}

bool SecondLevelIsNear() { return Avx512InHalves() || FirstLevelBytes() >= (48 << 10); }

bool Avx512InHalves() {
#if defined(__x86_64__)
  static const bool halves = IsaAvailable(Isa::kAvx512) && __builtin_cpu_is("amd") && FirstLevelBytes() < (48 << 10);
  return halves;
#else
  return false;
#endif
}

void SetIsa(Isa isa) {
  if (!IsaAvailable(isa)) {
    throw std::runtime_error(std::string("instruction set ") + IsaName(isa) + ": this CPU or build does not have it");
  }
  active.store(static_cast<int>(isa), std::memory_order_release);
}

}  // namespace lipfast
