// Each pixel over its channels, a few neighbours of a row at a time; for kernel sources only.
#pragma once

#include "cpu/lanes.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

constexpr int kPiece = 4;       // vectors of a row that go together
constexpr int64_t kFlush = 64;  // channels summed up before they join the total: bounds the rounding error
constexpr int64_t kVector = kLanes;

static inline int64_t PiecesOfRow(const LaneMap& m) { return (m.block_w + kPiece - 1) / kPiece; }
static inline int64_t Pieces(const LaneMap& m) { return m.batch * m.block_h * PiecesOfRow(m); }

struct Place {
  int64_t n, row, col, cols;
};

static inline Place PieceAt(const LaneMap& m, int64_t i) {
  const int64_t of_row = PiecesOfRow(m), row = i / of_row, col = i % of_row * kPiece;
  return {row / m.block_h, row % m.block_h, col, AtMost(kPiece, m.block_w - col)};
}

// run.Of<vectors>(place) for a piece: all of it, or one vector after the other.
template <class Run>
inline void RunPiece(Place at, const Run& run) {
  if (at.cols == kPiece) return run.template Of<kPiece>(at);
  for (; at.cols > 0; --at.cols, ++at.col) run.template Of<1>(at);
}

template <class Run>
inline void ForEachPiece(const LaneMap& m, int threads, const Run& run) {
  ParallelFor(threads, Pieces(m), [&](int64_t i) { RunPiece(PieceAt(m, i), run); });
}

// totals[k] = sum over channels of term(c, k)
template <int kVectors, class Term>
inline void SumChannels(int64_t channels, const Term& term, V* totals) {
  for (int k = 0; k < kVectors; ++k) totals[k] = Zero();
  for (int64_t first = 0; first < channels; first += kFlush) {
    V part[kVectors];
    for (int k = 0; k < kVectors; ++k) part[k] = Zero();
    const int64_t last = AtMost(first + kFlush, channels);
    for (int64_t c = first; c < last; ++c) {
      LIPFAST_UNROLL
      for (int k = 0; k < kVectors; ++k) part[k] = Add(part[k], term(c, k));
    }
    for (int k = 0; k < kVectors; ++k) totals[k] = Add(totals[k], part[k]);
  }
}

// kVectors neighbours of a map.
struct Columns {
  float* data;
  int64_t channel;
  Columns(const LaneMap& m, const Place& at) : data(m.At(at.n, 0, at.row, at.col)), channel(m.channel_stride) {}
  float* At(int64_t c, int k) const { return data + c * channel + k * kVector; }
  V operator()(int64_t c, int k) const { return Load(At(c, k)); }
};

}  // namespace LIPFAST_NS
}  // namespace lipfast
