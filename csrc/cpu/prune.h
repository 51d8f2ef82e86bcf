// One pruning round over many tensors: exactly the k smallest surviving magnitudes
// die, and the rest is rewound and packed in the same pass.
//
// No sort, and no histogram over all weights: a fixed sample brackets the k-th
// magnitude, one pass counts what lies below the bracket and copies the few per
// cent within it, and a radix select on the float bits of those finds the cut. When
// the sample misled (many equal weights), the same runs with every weight bracketed;
// the answer is exact either way and never depends on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/select.h"

namespace lipfast {

// One tensor: its scores and which weights live, a byte each, 0 or 1.
struct WeightPart {
  const float* score;
  const uint8_t* alive;
  int64_t size;
};

// Where one tensor's survivors go; see PrunedRun. Each pointer may be null.
struct PrunedPart {
  const float* start;
  uint8_t* mask;
  uint8_t* bits;
  float* dense;
};

class Pruning {
 public:
  // Finds the cut. The parts' memory must stay as it is until Write is done.
  Pruning(std::vector<WeightPart> parts, int64_t count, int threads);

  int64_t living() const { return living_; }
  // The first part with a living NaN, -1 if none.
  int64_t nan_part() const { return nan_part_; }
  // Whether there is a cut: no NaN and 0 <= count <= living.
  bool valid() const { return nan_part_ < 0 && count_ >= 0 && count_ <= living_; }

  int64_t survivors() const { return living_ - count_; }

  // Writes each part's survivors, one for each of the constructor's parts; values
  // [survivors] takes them all, part after part, and may be null. Only if valid.
  void Write(const std::vector<PrunedPart>& to, float* values, int threads) const;

 private:
  struct Chunk {
    int64_t part, begin, size;
    KeyCounts counts;
    int64_t ties, kept, first_value;
  };

  const WeightPart& PartOf(const Chunk& chunk) const { return parts_[chunk.part]; }
  void Bracket(int64_t total, int32_t* low, int32_t* high) const;
  void Collect(int32_t low, int32_t high, int threads);
  bool Bracketed() const;
  int64_t FindCut(int32_t low, int32_t high, int64_t rank, int threads);
  void ShareOut(int64_t ties, int threads);

  std::vector<WeightPart> parts_;
  std::vector<Chunk> chunks_;
  std::unique_ptr<int32_t[]> candidates_;  // kChunk for each chunk; touched only where it holds some
  int64_t count_, living_ = 0, below_ = 0, within_ = 0, nan_part_ = -1;
  int32_t cut_ = 0;
};

int64_t CountOnes(const uint8_t* mask, int64_t n, int threads);
// values [CountOnes(mask)] = the weights of dense [n] where mask [n] is 1, in order.
void Gather(const float* dense, const uint8_t* mask, int64_t n, float* values, int threads);
// The reverse; +0 where the mask is 0.
void Scatter(const float* values, const uint8_t* mask, int64_t n, float* dense, int threads);

}  // namespace lipfast
