#include "cpu/fingerprint.h"

#include <cstring>

namespace lipfast {
namespace LIPFAST_NS {
namespace {

constexpr int kWords = 8;  // 64 bytes a step: one AVX-512 vector
constexpr uint64_t kPrime = 0x9e3779b185ebca87u;

// Invertible in `word`.
inline uint64_t Mix(uint64_t state, uint64_t word) {
  state ^= word;
  return (state << 27 | state >> 37) * kPrime;
}

// Two sums for each of eight columns of words, which compilers turn into vectors:
// of the words, in which a single change cannot hide, and of products of a word's
// halves after a key that differs from row to row is mixed in, which see what moved
// or cancels in the first.
uint64_t Mark(const uint8_t* data, int64_t bytes, uint64_t seed) {
  uint64_t sums[kWords] = {}, products[kWords] = {}, keys[kWords];
  for (int i = 0; i < kWords; ++i) keys[i] = (seed + static_cast<uint64_t>(i) + 1) * kPrime;
  int64_t at = 0;
  for (; at + 8 * kWords <= bytes; at += 8 * kWords) {
    uint64_t words[kWords];
    std::memcpy(words, data + at, sizeof(words));
    for (int i = 0; i < kWords; ++i) {
      const uint64_t keyed = words[i] ^ keys[i];
      products[i] += (keyed & 0xffffffffu) * (keyed >> 32);
      sums[i] += words[i];
      keys[i] += kPrime;
    }
  }
  uint64_t mark = Mix(seed, static_cast<uint64_t>(bytes));
  for (; at < bytes; ++at) mark = Mix(mark, data[at]);
  for (int i = 0; i < kWords; ++i) mark = Mix(Mix(mark, sums[i]), products[i]);
  return mark;
}

}  // namespace

extern const FingerprintKernels fingerprint_kernels;
const FingerprintKernels fingerprint_kernels = {Mark};

}  // namespace LIPFAST_NS
}  // namespace lipfast
