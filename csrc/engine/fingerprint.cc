#include "engine/fingerprint.h"

#include <cstring>
#include <vector>

#include "cpu/pool.h"

namespace lipfast {
namespace {

constexpr int64_t kChunk = int64_t{1} << 18;  // bytes
constexpr int kChains = 8;                    // independent products, to hide their latency
constexpr uint64_t kPrime = 0x9e3779b185ebca87u;

// Each step is invertible in the word read, so a single changed word always shows.
// The rotation is what keeps two changed sign bits from cancelling: a product alone
// never moves the highest bit down.
inline uint64_t Mix(uint64_t state, uint64_t word) {
  state ^= word;
  return (state << 27 | state >> 37) * kPrime;
}

uint64_t ChunkMark(const uint8_t* data, int64_t bytes, uint64_t seed) {
  uint64_t chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = seed + static_cast<uint64_t>(i + 1) * kPrime;
  int64_t at = 0;
  for (; at + 8 * kChains <= bytes; at += 8 * kChains) {
    uint64_t words[kChains];
    std::memcpy(words, data + at, sizeof(words));
    for (int i = 0; i < kChains; ++i) chains[i] = Mix(chains[i], words[i]);
  }
  uint64_t mark = static_cast<uint64_t>(bytes);
  for (; at < bytes; ++at) mark = Mix(mark, data[at]);
  for (uint64_t chain : chains) mark = Mix(mark, chain);
  return mark;
}

}  // namespace

uint64_t Fingerprint(const uint8_t* data, int64_t bytes, uint64_t seed, int threads) {
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
  std::vector<uint64_t> marks(static_cast<size_t>(chunks));
  ParallelFor(threads, chunks, [&](int64_t i) {
    const int64_t begin = i * kChunk, left = bytes - begin;
    marks[static_cast<size_t>(i)] = ChunkMark(data + begin, left < kChunk ? left : kChunk, seed);
  });
  uint64_t mark = seed;
  for (uint64_t part : marks) mark = Mix(mark, part);
  return mark;
}

}  // namespace lipfast
