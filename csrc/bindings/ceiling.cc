#include "cpu/ceiling.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "bindings/checks.h"
#include "cpu/arena.h"
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

// By memcpy or by a loop over vectors, whichever is faster: where memcpy takes to string
// instructions, some processors and hypervisors run those at a tenth of the speed.
double CopyBandwidth(int64_t bytes, int threads, double seconds) {
  Check(bytes >= 1 && threads >= 1 && seconds > 0, "copy_bandwidth: bytes, threads and seconds must be positive");
  constexpr int64_t kVectorBytes = 64, kChunk = 256 << 10;
  const int64_t whole = (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes, floats = whole / 4;
  Arena from(whole), to(whole);
  std::fill(from.data(), from.data() + floats, 1.0f);  // memory of its own, not the system's page of zeros
  const auto rate = [&](const auto& copy) {
    return MedianRate(seconds / 2, 2.0 * static_cast<double>(whole), [&] {
      ParallelFor(threads, (whole + kChunk - 1) / kChunk, [&](int64_t chunk) {
        const int64_t begin = chunk * kChunk / 4;
        copy(from.data() + begin, to.data() + begin, std::min(kChunk, whole - chunk * kChunk));
      });
    });
  };
  py::gil_scoped_release release;
  const auto vectors = Kernels<CeilingKernels>().copy;
  return std::max(
      rate([](const float* source, float* sink, int64_t count) { std::memcpy(sink, source, count); }),
      rate([=](const float* source, float* sink, int64_t count) { vectors(source, sink, count / kVectorBytes); }));
}

// What threads pay to see each other's work. Two that share a core take turns by the system's clock, so as few as
// three round trips must do.
double CoreRoundTrip(double seconds) {
  Check(seconds > 0, "core_round_trip: seconds must be positive");
  constexpr int kTrips = 20;
  py::gil_scoped_release release;
  std::atomic<int> ball{0};  // 1: on its way, 0: back, -1: the other thread may go
  std::thread other([&] {
    for (int seen; (seen = ball.load(std::memory_order_acquire)) >= 0;) {
      if (seen == 1) ball.store(0, std::memory_order_release);
    }
  });
  const double trips = MedianRate(seconds, kTrips, [&] {
    for (int i = 0; i < kTrips; ++i) {
      ball.store(1, std::memory_order_release);
      while (ball.load(std::memory_order_acquire) == 1) {
      }
    }
  });
  ball.store(-1, std::memory_order_release);
  other.join();
  return 1 / trips;
}

}  // namespace

void BindCeiling(py::module_& m) {
  m.def("fma_peak", &FmaPeak, py::arg("threads"), py::arg("seconds"),
        "Floating-point operations a second at most, with the instruction set in use.");
  m.def("copy_bandwidth", &CopyBandwidth, py::arg("bytes"), py::arg("threads"), py::arg("seconds"),
        "Bytes read plus bytes written a second by the fastest copy of a block of this size.");
  m.def("core_round_trip", &CoreRoundTrip, py::arg("seconds"),
        "Seconds that a cache line takes from one thread to another and back, between the cores that they run on.");
}

}  // namespace lipfast
