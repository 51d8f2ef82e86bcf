#include "cpu/ceiling.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "bindings/checks.h"
#include "cpu/isa.h"
#include "cpu/pool.h"

namespace lipfast {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Median of work / seconds over calls of `burst`, repeated for `seconds`.
template <class Burst>
double MedianRate(double seconds, double work, const Burst& burst) {
  burst();  // wakes the threads and touches the memory
  std::vector<double> rates;
  const auto start = Clock::now();
  while (rates.size() < 3 || SecondsSince(start) < seconds) {
    const auto before = Clock::now();
    burst();
    rates.push_back(work / SecondsSince(before));
  }
  std::nth_element(rates.begin(), rates.begin() + rates.size() / 2, rates.end());
  return rates[rates.size() / 2];
}

double FmaPeak(int threads, double seconds) {
  Check(threads >= 1 && seconds > 0, "fma_peak: threads and seconds must be positive");
  constexpr int64_t kRounds = 2000;
  const CeilingKernels& kernels = Kernels<CeilingKernels>();
  std::vector<float> sums(threads);  // read by nobody, but the compiler cannot know
  py::gil_scoped_release release;
  return MedianRate(seconds, static_cast<double>(kernels.flops_per_round) * kRounds * threads, [&] {
    ParallelFor(threads, threads, [&](int64_t chunk) { sums[chunk] = kernels.fma_burst(kRounds); });
  });
}

double CopyBandwidth(int64_t bytes, int threads, double seconds) {
  Check(bytes >= 1 && threads >= 1 && seconds > 0, "copy_bandwidth: bytes, threads and seconds must be positive");
  constexpr int64_t kChunk = 256 << 10;
  std::vector<char> from(bytes, 1), to(bytes);
  py::gil_scoped_release release;
  return MedianRate(seconds, 2.0 * static_cast<double>(bytes), [&] {
    ParallelFor(threads, (bytes + kChunk - 1) / kChunk, [&](int64_t chunk) {
      const int64_t begin = chunk * kChunk;
      std::memcpy(to.data() + begin, from.data() + begin, std::min(kChunk, bytes - begin));
    });
  });
}

}  // namespace

void BindCeiling(py::module_& m) {
  m.def("fma_peak", &FmaPeak, py::arg("threads"), py::arg("seconds"),
        "Floating-point operations a second at most, with the instruction set in use.");
  m.def("copy_bandwidth", &CopyBandwidth, py::arg("bytes"), py::arg("threads"), py::arg("seconds"),
        "Bytes read plus bytes written a second by memcpy of a block of this size.");
}

}  // namespace lipfast
