// A 64-bit mark of memory that changes when the memory does: whether weights are
// still those that were packed is asked before every call of a compiled graph.
#pragma once

#include <cstdint>

namespace lipfast {

// Not cryptographic: two contents share a mark with probability 2^-64, unless made
// to. Reads at memory speed; does not depend on the number of threads.
uint64_t Fingerprint(const uint8_t* data, int64_t bytes, uint64_t seed, int threads);

}  // namespace lipfast
