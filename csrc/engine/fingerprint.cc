#include "engine/fingerprint.h"

#include <algorithm>

#include "cpu/fingerprint.h"
#include "cpu/isa.h"
#include "cpu/pool.h"

namespace lipfast {

uint64_t Fingerprint(const std::vector<Bytes>& parts, int threads) {
  constexpr int64_t kPiece = int64_t{1} << 17;  // bytes
  std::vector<Bytes> pieces;
  for (const Bytes& part : parts) {
    pieces.push_back({part.data, std::min(part.count, kPiece)});
    for (int64_t at = kPiece; at < part.count; at += kPiece) {
      pieces.push_back({part.data + at, std::min(part.count - at, kPiece)});
    }
  }
  // Each piece's own mark has its number mixed in, so their sum tells them apart.
  std::vector<uint64_t> marks(pieces.size());
  const FingerprintKernels& kernels = Kernels<FingerprintKernels>();
  ParallelFor(threads, static_cast<int64_t>(pieces.size()),
              [&](int64_t i) { marks[i] = kernels.mark(pieces[i].data, pieces[i].count, static_cast<uint64_t>(i)); });
  uint64_t mark = pieces.size();
  for (uint64_t piece : marks) mark += piece;
  return mark;
}

}  // namespace lipfast
