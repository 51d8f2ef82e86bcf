// A 64-bit mark of one run of memory; see engine/fingerprint.h.
#pragma once

#include <cstdint>

namespace lipfast {

struct FingerprintKernels {
  // Differs with the content, the order of what is read, and the seed. A change of
  // eight aligned bytes alone always shows. The same on every instruction set.
  uint64_t (*mark)(const uint8_t* data, int64_t bytes, uint64_t seed);
};

}  // namespace lipfast
