// A 64-bit mark of memory that changes when the memory does: whether weights are
// still those that were packed is asked before every call of a compiled graph.
#pragma once

#include <cstdint>
#include <vector>

namespace lipfast {

struct Bytes {
  const uint8_t* data;
  int64_t count;
};

// Not cryptographic: two contents share a mark by chance, of about 2^-64, unless made
// to. Reads at memory speed; does not depend on the number of threads.
uint64_t Fingerprint(const std::vector<Bytes>& parts, int threads);

}  // namespace lipfast
