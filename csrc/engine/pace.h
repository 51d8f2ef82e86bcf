// Which steps of a section one thread alone runs, while its threads are on cores that share no cache.
//
// There, handing a map from core to core takes longer than the sums of a small layer (docs/kernels.md, "Two cores, near
// or far"), so that a network of small maps is faster on one of them. The system moves threads while a program runs:
// each run asks the pool how far apart they are. Small is what takes little time near each other. No bit of a result
// depends on any of it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

namespace lipfast {

class Pace {
 public:
  // Before a run.
  void Begin(size_t steps, int threads) {
    if (least_.size() != steps || threads_ != threads) {
      *this = {};
      threads_ = threads;
      least_.assign(steps, std::numeric_limits<double>::infinity());
    }
    run_ = (run_ + 1) % kRunsBetweenLooks;
    looks_ = threads > 1 && (!far_ || run_ == 0);
  }

  // Whether this run has yet to ask how long a message to another thread and back takes; and whether that has to be
  // woken first, as steps no longer do.
  bool Looks() const { return looks_; }
  bool Wakes() const { return looks_ && far_; }

  // The answer, in seconds; 0: that thread is asleep or busy.
  void Saw(double round_trip) {
    if (round_trip <= 0) return;
    far_ = round_trip > kFar;
    looks_ = false;
  }

  bool IsAlone(size_t step) const { return far_ && least_[step] * threads_ < kSmall; }

  void Took(size_t step, double seconds) {
    if (!IsAlone(step)) least_[step] = std::min(least_[step], seconds);
  }

 private:
  static constexpr double kFar = 200e-9;       // seconds; messages take 20 to 140 ns near, 280 to 400 far (Zen 4)
  static constexpr double kSmall = 250e-6;     // of all threads together
  static constexpr int kRunsBetweenLooks = 8;  // while far: those cost a little more

  int threads_ = 0, run_ = 0;
  bool far_ = false, looks_ = false;
  std::vector<double> least_;  // time of each step on all threads
};

}  // namespace lipfast
