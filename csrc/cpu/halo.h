// How halos are filled; for kernel sources only.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

// Where one position along an axis takes its pixels from, for each of the blocks
// along that axis: block `from[g]` at position `source[g]`; from[g] < 0 means zero.
struct AxisRule {
  int64_t source[kGrid];
  int from[kGrid];
  bool identity;  // the position already holds all blocks' own pixels
};

static inline AxisRule RuleAt(int64_t position, const Axis& axis, Padding mode, int64_t pad) {
  const auto [grid, block, side] = axis;
  AxisRule rule;
  rule.identity = position >= 0 && position < block;
  for (int g = 0; g < grid; ++g) {
    const int64_t at = g * block + position;
    const bool outside = at < 0 || at >= side;
    const int64_t source = outside ? PaddingSource(at, side, mode, pad) : at;
    rule.from[g] = source < 0 ? -1 : static_cast<int>(source / block);
    rule.source[g] = source < 0 ? 0 : source % block;
    if (outside) rule.identity = false;
  }
  return rule;
}

// The lane-level form of a rule: out[l] = vector source[k] at lane[k][l] for the
// lanes in mask[k]; lanes in no mask are zero.
struct LaneRule {
  int count;
  int64_t source[kGrid];
  int32_t lane[kGrid][kLanes];
  uint16_t mask[kGrid];
};

static inline LaneRule ToLanes(const AxisRule& axis, int64_t grid, bool rows) {
  LaneRule rule = {};
  for (int l = 0; l < kLanes; ++l) {
    const LanePlace& place = PlaceOf(l, grid);
    const int g = rows ? place.row : place.col, from = axis.from[g];
    if (from < 0) continue;
    int k = 0;
    while (k < rule.count && rule.source[k] != axis.source[g]) ++k;
    if (k == rule.count) rule.source[rule.count++] = axis.source[g];
    rule.lane[k][l] =
        static_cast<int32_t>(LaneAt(place.picture, rows ? from : place.row, rows ? place.col : from, grid));
    rule.mask[k] = static_cast<uint16_t>(rule.mask[k] | 1u << l);
  }
  return rule;
}

#if LIPFAST_TARGET == 1
// v with x[lane[i]] at each i in the mask, for 8 of the 16 lanes.
static inline __m256 PermuteLive(__m256 v, V x, const int32_t* lane, int mask) {
  const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane));
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i live = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits);
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(from, 28));  // sign: the lane is in x's upper half
  const __m256 moved =
      _mm256_blendv_ps(_mm256_permutevar8x32_ps(x.a, from), _mm256_permutevar8x32_ps(x.b, from), upper);
  return _mm256_blendv_ps(v, moved, _mm256_castsi256_ps(live));
}
#endif

static inline void Gather(const LaneRule& rule, const float* base, int64_t step, float* out) {
#if LIPFAST_TARGET == 2
  V v = Zero();
  for (int k = 0; k < rule.count; ++k) {
    v = _mm512_mask_permutexvar_ps(v, rule.mask[k], _mm512_loadu_si512(rule.lane[k]),
                                   Load(base + rule.source[k] * step));
  }
  Store(out, v);
#elif LIPFAST_TARGET == 1
  V v = Zero();
  for (int k = 0; k < rule.count; ++k) {
    const V x = Load(base + rule.source[k] * step);
    v.a = PermuteLive(v.a, x, rule.lane[k], rule.mask[k]);
    v.b = PermuteLive(v.b, x, rule.lane[k] + 8, rule.mask[k] >> 8);
  }
  Store(out, v);
#else
  alignas(64) float t[kLanes] = {};
  for (int k = 0; k < rule.count; ++k) {
    const float* from = base + rule.source[k] * step;
    for (int l = 0; l < kLanes; ++l) {
      if (rule.mask[k] >> l & 1) t[l] = from[rule.lane[k][l]];
    }
  }
  std::memcpy(out, t, sizeof(t));
#endif
}

// A position along an axis, in pixels of a block, and what belongs there.
struct Edge {
  int64_t position;
  LaneRule rule;
};

// The positions along an axis that filling must write: the halo, and dead pixels.
static inline std::vector<Edge> Edges(const Axis& axis, int64_t halo, Padding mode, int64_t pad, bool rows) {
  std::vector<Edge> edges;
  const auto [grid, block, side] = axis;
  const int64_t first_dead = side - (grid - 1) * block;  // of the last block
  for (int64_t position = -halo; position < block + halo; ++position) {
    if (position == 0 && first_dead >= block) position = block;  // no dead pixels
    if (position >= block + halo) break;
    const AxisRule rule = RuleAt(position, axis, mode, pad);
    if (!rule.identity) edges.push_back({position, ToLanes(rule, grid, rows)});
  }
  return edges;
}

// Fills halos and dead pixels of planes of one shape: the rules are worked out once.
class HaloFiller {
 public:
  // The whole halo.
  HaloFiller(const LaneMap& m, Padding mode, int64_t pad) : HaloFiller(m, m.halo, mode, pad) {}
  // Of the halo only the innermost `reach` vectors; 0 fills dead pixels alone.
  HaloFiller(const LaneMap& m, int64_t reach, Padding mode, int64_t pad)
      : rows_(Edges(m.rows(), reach, mode, pad, true)),
        columns_(Edges(m.columns(), reach, mode, pad, false)),
        block_h_(m.block_h),
        block_w_(m.block_w),
        reach_(reach),
        row_stride_(m.row_stride) {}

  // plane: pixel (0, 0) of every block.
  void Fill(float* plane) const {
    for (const Edge& edge : rows_) {
      for (int64_t col = 0; col < block_w_; ++col) {
        float* column = plane + col * kLanes;
        Gather(edge.rule, column, row_stride_, column + edge.position * row_stride_);
      }
    }
    for (const Edge& edge : columns_) {
      for (int64_t row = -reach_; row < block_h_ + reach_; ++row) {
        float* line = plane + row * row_stride_;
        Gather(edge.rule, line, kLanes, line + edge.position * kLanes);
      }
    }
  }

  // Brings what Fill will read and write of a plane into the second cache level.
  void Fetch(const float* plane) const {
    for (int64_t row = -reach_; row < block_h_ + reach_; ++row) {
      const float* line = plane + row * row_stride_;
      if (row <= reach_ || row >= block_h_ - reach_ - 1) {
        FetchVectors(line, -reach_, block_w_ + reach_);
      } else {
        FetchVectors(line, -reach_, reach_);
        FetchVectors(line, block_w_ - reach_, block_w_ + reach_);
      }
    }
  }

 private:
  static void FetchVectors(const float* line, int64_t first, int64_t last) {
    for (int64_t col = first; col < last; ++col) PrefetchFar(line + col * kLanes);
  }

  std::vector<Edge> rows_, columns_;
  int64_t block_h_, block_w_, reach_, row_stride_;
};

// Zero padding written along with the pixels, while they are in the cache. Outside the
// picture all is zero, so a vector of the halo is one vector of pixels whose lanes move
// to the neighbouring block. Blocks are as large as the halo at least.
class ZeroHalo {
 public:
  // halo 0: nothing is written.
  ZeroHalo(const Axis& rows, const Axis& columns, int64_t halo) : rows_(rows), columns_(columns), halo_(halo) {}

  // Pixels [row, row + rows) x [col, col + cols) of some planes were written; `plane` is
  // pixel (0, 0) of the first. Their copies go to the halo, dead ones of them become zero.
  void Follow(float* plane, int64_t plane_stride, int64_t planes, int64_t row_stride, int64_t row, int64_t col,
              int64_t rows, int64_t cols) const {
    if (halo_ == 0) return;
    std::vector<Move> moves;
    for (int64_t r = row; r < row + rows; ++r) {
      for (int64_t c = col; c < col + cols; ++c) AddMoves(r, c, row_stride, &moves);
    }
    for (int64_t i = 0; i < planes && !moves.empty(); ++i, plane += plane_stride) {
      for (const Move& m : moves) Store(plane + m.to, LoadLive(plane + m.from, m.live));
    }
  }

 private:
  // Lanes move by as many floats as a load is shifted.
  struct Move {
    int64_t from, to;
    int32_t live[kLanes];  // -1, or 0 where zero comes out
  };

  // The copies of vector (r, c), the last of which may be itself without its dead lanes.
  void AddMoves(int64_t r, int64_t c, int64_t row_stride, std::vector<Move>* moves) const {
    constexpr int kSteps[] = {-1, 1, 0};
    for (int down : kSteps) {
      if (!Reaches(r, rows_.block, down)) continue;
      for (int right : kSteps) {
        if (!Reaches(c, columns_.block, right)) continue;
        Move m = {r * row_stride + c * kLanes + down * columns_.grid + right,
                  (r + down * rows_.block) * row_stride + (c + right * columns_.block) * kLanes,
                  {}};
        int live = 0;
        for (int l = 0; l < kLanes; ++l) {
          const LanePlace& place = PlaceOf(l, columns_.grid);
          const bool inside = Holds(rows_, place.row + down, r) && Holds(columns_, place.col + right, c);
          m.live[l] = inside ? -1 : 0;
          live += inside;
        }
        if (down != 0 || right != 0 || live < kLanes) moves->push_back(m);
      }
    }
  }

  // Whether a pixel of a block is one of the picture.
  static bool Holds(const Axis& axis, int64_t block, int64_t at) {
    return block >= 0 && block < axis.grid && block * axis.block + at < axis.side;
  }

  // Whether a pixel `step` blocks on is in the halo, or the pixel itself.
  bool Reaches(int64_t at, int64_t block, int step) const {
    return step == 0 || (step < 0 ? at >= block - halo_ : at < halo_);
  }

  Axis rows_, columns_;
  int64_t halo_;
};

}  // namespace LIPFAST_NS
}  // namespace lipfast
