#include "cpu/lanes.h"

#include <cstdlib>

#include "cpu/pool.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

int64_t AtMost(int64_t a, int64_t b) { return a < b ? a : b; }

// How many of the pixels (row, col), (row, col + 1), .. up to `most` of block
// `lane` lie in the picture; 0 where the whole row is dead.
int64_t LivePixels(const LaneMap& m, int lane, int64_t row, int64_t col, int64_t most) {
  if (lane / kGrid * m.block_h + row >= m.height) return 0;
  const int64_t live = m.width - (lane % kGrid * m.block_w + col);
  return live < 0 ? 0 : AtMost(live, most);
}

int64_t PlainOffset(const PlainMap& p, const LaneMap& m, int lane, int64_t row, int64_t col) {
  return (lane / kGrid * m.block_h + row) * p.row_stride + (lane % kGrid * m.block_w + col) * p.col_stride;
}

// Row-contiguous tensors: 16 columns of 16 blocks at a time, one transpose.
void RowToLanes(const float* plane, const PlainMap& p, const LaneMap& m, float* out, int64_t row) {
  for (int64_t col = 0; col < m.block_w; col += kLanes) {
    const int64_t cols = AtMost(kLanes, m.block_w - col);
    V v[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t live = LivePixels(m, lane, row, col, cols);
      v[lane] = live ? LoadPart(plane + PlainOffset(p, m, lane, row, col), live) : Zero();
    }
    Transpose16(v);
    for (int64_t i = 0; i < cols; ++i) Store(out + (col + i) * kLanes, v[i]);
  }
}

void RowFromLanes(const float* in, const LaneMap& m, const PlainMap& p, float* plane, int64_t row) {
  for (int64_t col = 0; col < m.block_w; col += kLanes) {
    const int64_t cols = AtMost(kLanes, m.block_w - col);
    V v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) v[i] = i < cols ? Load(in + (col + i) * kLanes) : Zero();
    Transpose16(v);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t live = LivePixels(m, lane, row, col, cols);
      if (live) StorePart(plane + PlainOffset(p, m, lane, row, col), v[lane], live);
    }
  }
}

// Channel-contiguous tensors: 16 channels of 16 blocks' pixels, one transpose.
void PixelsToLanes(const PlainMap& p, const LaneMap& m, int64_t n, int64_t row) {
  for (int64_t col = 0; col < m.block_w; ++col) {
    for (int64_t c = 0; c < m.channels; c += kLanes) {
      const int64_t count = AtMost(kLanes, m.channels - c);
      V v[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        v[lane] = LivePixels(m, lane, row, col, 1)
                      ? LoadPart(p.data + n * p.batch_stride + c + PlainOffset(p, m, lane, row, col), count)
                      : Zero();
      }
      Transpose16(v);
      for (int64_t i = 0; i < count; ++i) Store(m.At(n, c + i, row, col), v[i]);
    }
  }
}

void PixelsFromLanes(const LaneMap& m, const PlainMap& p, int64_t n, int64_t row) {
  for (int64_t col = 0; col < m.block_w; ++col) {
    for (int64_t c = 0; c < m.channels; c += kLanes) {
      const int64_t count = AtMost(kLanes, m.channels - c);
      V v[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) v[i] = i < count ? Load(m.At(n, c + i, row, col)) : Zero();
      Transpose16(v);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (LivePixels(m, lane, row, col, 1)) {
          StorePart(p.data + n * p.batch_stride + c + PlainOffset(p, m, lane, row, col), v[lane], count);
        }
      }
    }
  }
}

// Any strides, pixel by pixel.
template <bool kToLanes>
void RowAnyStride(float* plane, const PlainMap& p, const LaneMap& m, float* vectors, int64_t row) {
  for (int64_t col = 0; col < m.block_w; ++col) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool live = LivePixels(m, lane, row, col, 1);
      float* pixel = plane + (live ? PlainOffset(p, m, lane, row, col) : 0);
      float* at = vectors + col * kLanes + lane;
      if (kToLanes) {
        *at = live ? *pixel : 0.0f;
      } else if (live) {
        *pixel = *at;
      }
    }
  }
}

void FromPlain(const PlainMap& from, const LaneMap& to, int threads) {
  if (from.channel_stride == 1 && from.col_stride != 1) {
    ParallelFor(threads, to.batch * to.block_h,
                [&](int64_t i) { PixelsToLanes(from, to, i / to.block_h, i % to.block_h); });
    return;
  }
  ParallelFor(threads, to.batch * to.channels, [&](int64_t i) {
    const int64_t n = i / to.channels, c = i % to.channels;
    float* plane = from.data + n * from.batch_stride + c * from.channel_stride;
    for (int64_t row = 0; row < to.block_h; ++row) {
      if (from.col_stride == 1) {
        RowToLanes(plane, from, to, to.At(n, c, row), row);
      } else {
        RowAnyStride<true>(plane, from, to, to.At(n, c, row), row);
      }
    }
  });
}

void ToPlain(const LaneMap& from, const PlainMap& to, int threads) {
  if (to.channel_stride == 1 && to.col_stride != 1) {
    ParallelFor(threads, from.batch * from.block_h,
                [&](int64_t i) { PixelsFromLanes(from, to, i / from.block_h, i % from.block_h); });
    return;
  }
  ParallelFor(threads, from.batch * from.channels, [&](int64_t i) {
    const int64_t n = i / from.channels, c = i % from.channels;
    float* plane = to.data + n * to.batch_stride + c * to.channel_stride;
    for (int64_t row = 0; row < from.block_h; ++row) {
      if (to.col_stride == 1) {
        RowFromLanes(from.At(n, c, row), from, to, plane, row);
      } else {
        RowAnyStride<false>(plane, to, from, from.At(n, c, row), row);
      }
    }
  });
}

// Where one position along one axis takes its pixels from, for each of the four
// blocks along that axis: block `from[g]` at position `source[g]`; from[g] < 0
// means zero. `pads` marks the blocks for which it is padding and not the copy of
// a padding pixel that another block has closer to its own pixels.
struct AxisRule {
  int64_t source[kGrid];
  int from[kGrid];
  bool pads[kGrid];
  bool identity;  // the position already holds all four blocks' own pixels
};

// The pixel that padding copies to `at`, which lies outside [0, side); -1 is zero.
int64_t PaddingSource(int64_t at, int64_t side, Padding mode, int64_t pad) {
  if (mode == Padding::kZero || at < -pad || at >= side + pad) return -1;
  switch (mode) {
    case Padding::kReflect:
      return at < 0 ? -at : 2 * (side - 1) - at;
    case Padding::kReplicate:
      return at < 0 ? 0 : side - 1;
    default:
      return at < 0 ? at + side : at - side;
  }
}

AxisRule RuleAt(int64_t position, int64_t block, int64_t side, Padding mode, int64_t pad) {
  AxisRule rule;
  rule.identity = position >= 0 && position < block;
  for (int g = 0; g < kGrid; ++g) {
    const int64_t at = g * block + position;
    const bool outside = at < 0 || at >= side;
    rule.pads[g] = outside && g == (at < 0 ? 0 : AtMost(at / block, kGrid - 1));
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

int LaneOf(int g, int other, bool rows) { return rows ? g * kGrid + other : other * kGrid + g; }

LaneRule ToLanes(const AxisRule& axis, bool rows, bool only_pads) {
  LaneRule rule = {};
  for (int g = 0; g < kGrid; ++g) {
    if (axis.from[g] < 0 || (only_pads && !axis.pads[g])) continue;
    int k = 0;
    while (k < rule.count && rule.source[k] != axis.source[g]) ++k;
    if (k == rule.count) rule.source[rule.count++] = axis.source[g];
    for (int other = 0; other < kGrid; ++other) {
      const int l = LaneOf(g, other, rows);
      rule.lane[k][l] = LaneOf(axis.from[g], other, rows);
      rule.mask[k] = static_cast<uint16_t>(rule.mask[k] | 1u << l);
    }
  }
  return rule;
}

void Gather(const LaneRule& rule, const float* base, int64_t step, float* out) {
#if LIPFAST_TARGET == 2
  V v = Zero();
  for (int k = 0; k < rule.count; ++k) {
    v = _mm512_mask_permutexvar_ps(v, rule.mask[k], _mm512_loadu_si512(rule.lane[k]),
                                   Load(base + rule.source[k] * step));
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

// Adds lanes to where they came from, one by one: two lanes may share a source.
void Scatter(const LaneRule& rule, const float* in, float* base, int64_t step) {
  for (int k = 0; k < rule.count; ++k) {
    float* to = base + rule.source[k] * step;
    for (int l = 0; l < kLanes; ++l) {
      if (rule.mask[k] >> l & 1) to[rule.lane[k][l]] += in[l];
    }
  }
}

// Positions along an axis that FillHalo must write: the halo, and dead pixels.
template <class Visit>
void ForEachBorder(int64_t block, int64_t side, int64_t halo, Padding mode, int64_t pad, bool rows, bool only_pads,
                   const Visit& visit) {
  const int64_t first_dead = side - (kGrid - 1) * block;  // of the last block
  for (int64_t position = -halo; position < block + halo; ++position) {
    if (position == 0 && first_dead >= block) position = block;  // no dead pixels
    if (position >= block + halo) break;
    const AxisRule axis = RuleAt(position, block, side, mode, pad);
    if (!axis.identity) visit(position, ToLanes(axis, rows, only_pads));
  }
}

void FillHalo(const LaneMap& m, Padding mode, int64_t pad, int threads) {
  ParallelFor(threads, m.batch * m.channels, [&](int64_t i) {
    float* plane = m.At(i / m.channels, i % m.channels);
    ForEachBorder(m.block_h, m.height, m.halo, mode, pad, true, false, [&](int64_t row, const LaneRule& rule) {
      for (int64_t col = 0; col < m.block_w; ++col) {
        float* column = plane + col * kLanes;
        Gather(rule, column, m.row_stride, column + row * m.row_stride);
      }
    });
    ForEachBorder(m.block_w, m.width, m.halo, mode, pad, false, false, [&](int64_t col, const LaneRule& rule) {
      for (int64_t row = -m.halo; row < m.block_h + m.halo; ++row) {
        float* line = plane + row * m.row_stride;
        Gather(rule, line, kLanes, line + col * kLanes);
      }
    });
  });
}

void FoldHalo(const LaneMap& m, Padding mode, int64_t pad, int threads) {
  // Dead pixels end as zeros: kZero's rules say which lanes of a position live.
  ParallelFor(threads, m.batch * m.channels, [&](int64_t i) {
    float* plane = m.At(i / m.channels, i % m.channels);
    ForEachBorder(m.block_w, m.width, m.halo, mode, pad, false, true, [&](int64_t col, const LaneRule& rule) {
      for (int64_t row = -m.halo; row < m.block_h + m.halo; ++row) {
        float* line = plane + row * m.row_stride;
        Scatter(rule, line + col * kLanes, line, kLanes);
      }
    });
    ForEachBorder(m.block_h, m.height, m.halo, mode, pad, true, true, [&](int64_t row, const LaneRule& rule) {
      for (int64_t col = 0; col < m.block_w; ++col) {
        float* column = plane + col * kLanes;
        Scatter(rule, column + row * m.row_stride, column, m.row_stride);
      }
    });
    ForEachBorder(m.block_h, m.height, 0, Padding::kZero, 0, true, false, [&](int64_t row, const LaneRule& rule) {
      for (int64_t col = 0; col < m.block_w; ++col) {
        float* column = plane + col * kLanes;
        Gather(rule, column, m.row_stride, column + row * m.row_stride);
      }
    });
    ForEachBorder(m.block_w, m.width, 0, Padding::kZero, 0, false, false, [&](int64_t col, const LaneRule& rule) {
      for (int64_t row = 0; row < m.block_h; ++row) {
        float* line = plane + row * m.row_stride;
        Gather(rule, line, kLanes, line + col * kLanes);
      }
    });
  });
}

void Reblock(const LaneMap& from, const LaneMap& to, int threads) {
  ParallelFor(threads, to.batch * to.channels, [&](int64_t i) {
    const float* in = from.At(i / to.channels, i % to.channels);
    float* out = to.At(i / to.channels, i % to.channels);
    for (int64_t y = 0; y < to.height; ++y) {
      const float* in_row = in + y % from.block_h * from.row_stride + y / from.block_h * kGrid;
      float* out_row = out + y % to.block_h * to.row_stride + y / to.block_h * kGrid;
      for (int64_t x = 0; x < to.width; ++x) {
        out_row[x % to.block_w * kLanes + x / to.block_w] = in_row[x % from.block_w * kLanes + x / from.block_w];
      }
    }
  });
}

}  // namespace

extern const LaneKernels lane_kernels;
const LaneKernels lane_kernels = {FromPlain, ToPlain, FillHalo, FoldHalo, Reblock};

}  // namespace LIPFAST_NS
}  // namespace lipfast
