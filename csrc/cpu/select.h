// Inner loops of pruning: magnitudes against bounds, survivors into packed form.
//
// A weight's key is its magnitude as bits (sign cleared), which order as the
// magnitudes do; a dead weight's key lies above all others. What runs over all
// tensors, and the threads, is in csrc/cpu/prune.h.
#pragma once

#include <cstdint>

namespace lipfast {

constexpr int32_t kInfinityKey = 0x7f800000;  // greater keys of living weights are NaN
constexpr int32_t kDeadKey = 0x7fffffff;

struct KeyCounts {
  int64_t living;      // of all
  int64_t below;       // living with key < low
  int64_t candidates;  // living with low <= key <= high
  bool nan;            // a living weight is NaN
};

// Where a run of n weights goes; each pointer may be null. `values` must have
// room for `kept` floats, the number of survivors, and nothing past it is written.
struct PrunedRun {
  const float* start;  // [n] what the weights rewind to; null only if dense and values are
  uint8_t* mask;       // [n] bytes: 1 survives
  uint8_t* bits;       // [(n + 7) / 8] the same as bits, the lowest bit first, zeros behind the last
  float* dense;        // [n] start where alive, +0 elsewhere; may be `score` or `start` itself
  float* values;       // [kept] start of the survivors
  int64_t kept;
};

struct SelectKernels {
  // Counts keys of [n] scores with [n] bytes alive, and copies those within
  // [low, high] in order. candidates: room for n rounded up to 16.
  KeyCounts (*collect)(const float* score, const uint8_t* alive, int64_t n, int32_t low, int32_t high,
                       int32_t* candidates);
  // Kills living weights whose key is below `cut`, and the first `ties` of those equal to it.
  void (*write)(const float* score, const uint8_t* alive, int64_t n, int32_t cut, int64_t ties, const PrunedRun& to);
  // Number of ones among n bytes, 0 or not.
  int64_t (*count)(const uint8_t* mask, int64_t n);
  // dense[i] = the next of `kept` values where mask[i], +0 elsewhere.
  void (*scatter)(const float* values, int64_t kept, const uint8_t* mask, int64_t n, float* dense);
};

}  // namespace lipfast
