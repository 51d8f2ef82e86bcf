#include "cpu/prune.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/isa.h"
#include "cpu/pool.h"

namespace lipfast {
namespace {

constexpr int64_t kChunk = 32768;  // weights; a multiple of 16, so that chunks share no byte of bits
constexpr int64_t kSample = 8192;
constexpr int64_t kSmall = 1 << 16;  // up to here a sample costs more than it saves
constexpr double kDeviations = 5;    // of the sample's rank: it misleads once in a million rounds
constexpr int64_t kGroups = 16;      // of chunks, each with its own histogram
constexpr int kDigitBits = 11;
constexpr int64_t kDigits = 1 << kDigitBits;

int32_t KeyOf(float score, bool alive) {
  int32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return alive ? bits & 0x7fffffff : kDeadKey;
}

int WidthOf(int32_t x) {
  int bits = 0;
  for (; x; x >>= 1) ++bits;
  return bits;
}

int64_t ChunkCount(int64_t n) { return (n + kChunk - 1) / kChunk; }

}  // namespace

Pruning::Pruning(std::vector<WeightPart> parts, int64_t count, int threads) : parts_(std::move(parts)), count_(count) {
  int64_t total = 0;
  for (size_t part = 0; part < parts_.size(); ++part) {
    const int64_t size = parts_[part].size;
    total += size;
    for (int64_t begin = 0; begin < size; begin += kChunk) {
      chunks_.push_back({static_cast<int64_t>(part), begin, std::min(kChunk, size - begin), {}, 0, 0, 0});
    }
  }
  candidates_.reset(new int32_t[chunks_.size() * kChunk]);  // not zeroed: most of it is never touched
  int32_t low = 0, high = kInfinityKey;
  if (total > kSmall && count_ > 0 && count_ <= total) Bracket(total, &low, &high);
  Collect(low, high, threads);
  if (!valid()) return;
  if (!Bracketed()) {
    low = 0;
    high = kInfinityKey;
    Collect(low, high, threads);
  }
  ShareOut(count_ > 0 ? FindCut(low, high, count_ - 1 - below_, threads) : 0, threads);
}

// Keys between which the count-th smallest lies, most likely: order statistics of
// weights at a fixed stride, the dead among them as the largest.
void Pruning::Bracket(int64_t total, int32_t* low, int32_t* high) const {
  std::vector<int32_t> sample;
  sample.reserve(kSample + 1);
  const int64_t step = total / kSample;
  int64_t next = step / 2;  // from the part's start
  for (const WeightPart& part : parts_) {
    for (; next < part.size; next += step) sample.push_back(KeyOf(part.score[next], part.alive[next]));
    next -= part.size;
  }
  const double share = static_cast<double>(count_) / static_cast<double>(total);
  const double drawn = static_cast<double>(sample.size());
  const double margin = kDeviations * std::sqrt(drawn * share * (1 - share)) + 2;
  const auto first = static_cast<int64_t>(std::floor(drawn * share - margin));
  const auto last = static_cast<int64_t>(std::ceil(drawn * share + margin));
  if (first > 0) {
    std::nth_element(sample.begin(), sample.begin() + first, sample.end());
    *low = std::min(sample[first], kInfinityKey);
  }
  if (last < static_cast<int64_t>(sample.size())) {
    std::nth_element(sample.begin(), sample.begin() + last, sample.end());
    *high = std::min(sample[last], kInfinityKey);
  }
}

void Pruning::Collect(int32_t low, int32_t high, int threads) {
  const SelectKernels& kernels = Kernels<SelectKernels>();
  ParallelFor(threads, static_cast<int64_t>(chunks_.size()), [&](int64_t i) {
    Chunk& chunk = chunks_[i];
    const WeightPart& part = PartOf(chunk);
    chunk.counts = kernels.collect(part.score + chunk.begin, part.alive + chunk.begin, chunk.size, low, high,
                                   &candidates_[i * kChunk]);
  });
  living_ = below_ = within_ = 0;
  for (const Chunk& chunk : chunks_) {
    living_ += chunk.counts.living;
    below_ += chunk.counts.below;
    within_ += chunk.counts.candidates;
    if (chunk.counts.nan && nan_part_ < 0) nan_part_ = chunk.part;
  }
}

bool Pruning::Bracketed() const { return count_ == 0 || (below_ < count_ && count_ <= below_ + within_); }

// Sets cut_ to the candidate of this rank (0 = smallest) and returns how many of the
// candidates equal to it die. Radix select: 11 bits of (key - low) at a time.
int64_t Pruning::FindCut(int32_t low, int32_t high, int64_t rank, int threads) {
  std::vector<int64_t> histogram(kGroups * kDigits);
  const auto chunks = static_cast<int64_t>(chunks_.size());
  int shift = WidthOf(high - low);
  int32_t prefix = 0;  // the digits found so far
  while (shift > 0) {
    const int above = shift;
    shift = std::max(0, shift - kDigitBits);
    std::fill(histogram.begin(), histogram.end(), 0);
    ParallelFor(threads, kGroups, [&](int64_t group) {
      int64_t* counts = &histogram[group * kDigits];
      for (int64_t i = group * chunks / kGroups; i < (group + 1) * chunks / kGroups; ++i) {
        const int32_t* keys = &candidates_[i * kChunk];
        for (int64_t k = 0; k < chunks_[i].counts.candidates; ++k) {
          const int32_t key = keys[k] - low;
          if (key >> above == prefix) ++counts[key >> shift & ((1 << (above - shift)) - 1)];
        }
      }
    });
    int32_t digit = 0;
    for (;; ++digit) {
      int64_t here = 0;
      for (int64_t group = 0; group < kGroups; ++group) here += histogram[group * kDigits + digit];
      if (rank < here) break;
      rank -= here;
    }
    prefix = prefix << (above - shift) | digit;
  }
  cut_ = low + prefix;
  return rank + 1;
}

// Gives each chunk its share of the ties, first come first served, and its place among the values.
void Pruning::ShareOut(int64_t ties, int threads) {
  const int32_t cut = cut_;
  ParallelFor(threads, static_cast<int64_t>(chunks_.size()), [&](int64_t i) {
    Chunk& chunk = chunks_[i];
    const int32_t* keys = &candidates_[i * kChunk];
    int64_t smaller = 0, equal = 0;
    for (int64_t k = 0; k < chunk.counts.candidates; ++k) {
      smaller += keys[k] < cut;
      equal += keys[k] == cut;
    }
    chunk.kept = chunk.counts.living - (count_ > 0 ? chunk.counts.below + smaller : 0);
    chunk.ties = equal;
  });
  int64_t value = 0;
  for (Chunk& chunk : chunks_) {
    chunk.ties = std::min(chunk.ties, ties);
    ties -= chunk.ties;
    chunk.kept -= chunk.ties;
    chunk.first_value = value;
    value += chunk.kept;
  }
}

void Pruning::Write(const std::vector<PrunedPart>& to, float* values, int threads) const {
  const SelectKernels& kernels = Kernels<SelectKernels>();
  ParallelFor(threads, static_cast<int64_t>(chunks_.size()), [&](int64_t i) {
    const Chunk& chunk = chunks_[i];
    const WeightPart& from = PartOf(chunk);
    const PrunedPart& part = to[chunk.part];
    const int64_t at = chunk.begin;
    const PrunedRun run = {part.start ? part.start + at : nullptr,        part.mask ? part.mask + at : nullptr,
                           part.bits ? part.bits + at / 8 : nullptr,      part.dense ? part.dense + at : nullptr,
                           values ? values + chunk.first_value : nullptr, chunk.kept};
    kernels.write(from.score + at, from.alive + at, chunk.size, cut_, chunk.ties, run);
  });
}

namespace {

// Ones before each chunk of a mask, and behind the last.
std::vector<int64_t> Offsets(const uint8_t* mask, int64_t n, int threads) {
  std::vector<int64_t> offsets(ChunkCount(n) + 1);
  const SelectKernels& kernels = Kernels<SelectKernels>();
  ParallelFor(threads, ChunkCount(n),
              [&](int64_t i) { offsets[i + 1] = kernels.count(mask + i * kChunk, std::min(kChunk, n - i * kChunk)); });
  for (int64_t i = 0; i < ChunkCount(n); ++i) offsets[i + 1] += offsets[i];
  return offsets;
}

}  // namespace

int64_t CountOnes(const uint8_t* mask, int64_t n, int threads) { return Offsets(mask, n, threads).back(); }

void Gather(const float* dense, const uint8_t* mask, int64_t n, float* values, int threads) {
  const std::vector<int64_t> offsets = Offsets(mask, n, threads);
  const SelectKernels& kernels = Kernels<SelectKernels>();
  ParallelFor(threads, ChunkCount(n), [&](int64_t i) {
    const int64_t at = i * kChunk;
    const PrunedRun run = {dense + at, nullptr, nullptr, nullptr, values + offsets[i], offsets[i + 1] - offsets[i]};
    kernels.write(dense + at, mask + at, std::min(kChunk, n - at), 0, 0, run);  // a cut of 0 kills nobody
  });
}

void Scatter(const float* values, const uint8_t* mask, int64_t n, float* dense, int threads) {
  const std::vector<int64_t> offsets = Offsets(mask, n, threads);
  const SelectKernels& kernels = Kernels<SelectKernels>();
  ParallelFor(threads, ChunkCount(n), [&](int64_t i) {
    const int64_t at = i * kChunk;
    kernels.scatter(values + offsets[i], offsets[i + 1] - offsets[i], mask + at, std::min(kChunk, n - at), dense + at);
  });
}

}  // namespace lipfast
