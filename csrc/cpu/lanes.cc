#include "cpu/lanes.h"

#include <cstdlib>

#include "cpu/halo.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

constexpr int64_t kColsAtOnce = 16;  // of tensors whose pixels are contiguous

struct alignas(64) Vector {
  float lanes[kLanes];
};

// A map of one sheet, and how many pixels of a picture the tensor has.
struct Sheet : LaneMap {
  int64_t there;
};

// Sheet n and its pictures, as a map and a tensor of their own.
Sheet SheetOf(const LaneMap& m, const PlainMap& p, int64_t n) {
  Sheet sheet = {m, p.pixels};
  sheet.data = m.At(n, 0);
  sheet.batch = 1;
  if (n + 1 < m.batch) sheet.missing = 0;
  return sheet;
}

PlainMap SheetOf(const PlainMap& p, const LaneMap& m, int64_t n) {
  PlainMap sheet = p;
  sheet.data += n * m.sheet() * p.batch_stride;
  return sheet;
}

// How many pixels there are from (y, x) on in a row of the picture; 0 where the whole row is dead.
int64_t LiveFrom(const Sheet& m, int64_t y, int64_t x) {
  if (y >= m.height) return 0;
  const int64_t live = AtMost(m.width - x, m.there - (y * m.width + x));
  return live < 0 ? 0 : live;
}

// How many of the pixels (row, col), (row, col + 1), .. up to `most` of block `lane` there are.
int64_t LivePixels(const Sheet& m, int lane, int64_t row, int64_t col, int64_t most) {
  const LanePlace& place = PlaceOf(lane, m.grid);
  if (place.picture >= m.pictures()) return 0;
  return AtMost(LiveFrom(m, place.row * m.block_h + row, place.col * m.block_w + col), most);
}

// From a sheet's first picture to pixel (row, col) of block `lane`.
int64_t PlainOffset(const PlainMap& p, const LaneMap& m, int lane, int64_t row, int64_t col) {
  const LanePlace& place = PlaceOf(lane, m.grid);
  return place.picture * p.batch_stride + (place.row * m.block_h + row) * p.row_stride +
         (place.col * m.block_w + col) * p.col_stride;
}

// Square blocks between the pixels of the 16 lanes, which lie apart, and lane vectors: `count` columns or channels
// without dead pixels, where they are at least kFewest. The last square may cover a part of the one before it again.
// Number i of pixels[lane] is the one of vector_at(i).
#if LIPFAST_TARGET >= 1
constexpr int64_t kSquare = 8, kFewest = LIPFAST_TARGET == 2 ? 1 : kSquare;

// The first columns of a row that have no dead pixel in any block: the last one has fewest.
int64_t WholeCols(const Sheet& m, int64_t row) {
  return m.missing > 0 ? 0 : LiveFrom(m, (m.grid - 1) * m.block_h + row, (m.grid - 1) * m.block_w);
}

#if LIPFAST_TARGET == 2
// CrossSquares in squares of sixteen, the only one cut where there are fewer: faster where shuffles have two pipes.
template <bool kToLanes, class At>
void CrossSixteen(float* const* pixels, const At& vector_at, int64_t count) {
  const int side = static_cast<int>(AtMost(count, kLanes));
  for (int64_t at = 0; at < count; at += kLanes) {
    const int64_t first = AtMost(at, count - side);
    V v[kLanes];
    LIPFAST_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      v[i] = kToLanes ? LoadPart(pixels[i] + first, side) : i < side ? Load(vector_at(first + i)) : Zero();
    }
    Transpose16(v);
    LIPFAST_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (!kToLanes) StorePart(pixels[i] + first, v[i], side);
      if (kToLanes && i < side) Store(vector_at(first + i), v[i]);
    }
  }
}

// CrossSquares where whole lines can be stored: sixteen lanes of four columns, or four lanes of sixteen.
template <bool kToLanes, class At>
void CrossLines(float* const* pixels, const At& vector_at, int64_t count) {
  constexpr int64_t kWidth = kToLanes ? 4 : kLanes;
  for (int64_t at = 0; at < count; at += kWidth) {
    const int64_t first = AtMost(at, count - kWidth);
    for (int64_t lane = 0; lane < kLanes; lane += kToLanes ? kLanes : 4) {
      const float* from[kLanes];
      float* to[4];
      LIPFAST_UNROLL
      for (int i = 0; i < kLanes; ++i) from[i] = kToLanes ? pixels[i] + first : vector_at(first + i) + lane;
      LIPFAST_UNROLL
      for (int i = 0; i < 4; ++i) to[i] = kToLanes ? vector_at(first + i) : pixels[lane + i] + first;
      TransposeFour(from, to);
    }
  }
}
#endif

// `lines`: sixteen pixels mostly are a line of the cache.
template <bool kToLanes, class At>
void CrossSquares(float* const* pixels, const At& vector_at, int64_t count, [[maybe_unused]] bool lines) {
#if LIPFAST_TARGET == 2
  if (!kToLanes && lines && count >= kLanes) return CrossLines<kToLanes>(pixels, vector_at, count);
  if (count < kSquare || Avx512InHalves()) return CrossSixteen<kToLanes>(pixels, vector_at, count);
  if (kToLanes) return CrossLines<kToLanes>(pixels, vector_at, count);
#endif
  // Lanes lie powers of two apart, often in one set of the cache: eight at a time stay in it until their line is done.
  for (int half = 0; half < kLanes; half += kSquare) {
    for (int64_t at = 0; at < count; at += kSquare) {
      const int64_t first = AtMost(at, count - kSquare);
      float *in_picture[kSquare], *in_lanes[kSquare];
      LIPFAST_UNROLL
      for (int i = 0; i < kSquare; ++i) {
        in_picture[i] = pixels[half + i] + first;
        in_lanes[i] = vector_at(first + i) + half;
      }
      Transpose8(kToLanes ? in_picture : in_lanes, kToLanes ? in_lanes : in_picture);
    }
  }
}

// The first columns of a row, by squares; how many it did.
template <bool kToLanes>
int64_t CrossRow(float* const* pixels, const Sheet& m, float* vectors, int64_t row) {
  const int64_t cols = WholeCols(m, row);
  if (cols < kFewest) return 0;
  CrossSquares<kToLanes>(pixels, [=](int64_t i) { return vectors + i * kLanes; }, cols, false);
  return cols;
}

// As CrossPixels, for so few channels that squares hold those of several pixels, where these follow each other.
template <bool kToLanes>
int64_t CrossFewChannels(const PlainMap& p, const Sheet& m, int64_t row, int64_t begin, int64_t end) {
  const int64_t count = (end - begin) * m.channels;
  if (p.col_stride != m.channels || count < kFewest) return begin;
  float* pixels[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) pixels[lane] = p.data + PlainOffset(p, m, lane, row, begin);
  float* vectors[kColsAtOnce * kSquare];
  for (int64_t i = 0; i < count; ++i) vectors[i] = m.At(0, i % m.channels, row, begin + i / m.channels);
  CrossSquares<kToLanes>(pixels, [&](int64_t i) { return vectors[i]; }, count, false);
  return end;
}

constexpr int64_t kAhead = 3;  // pixels: strides this long have no hardware that fetches ahead

// Columns [begin, last) of a row by squares, a few channels at a time: more planes than a core follows would be
// written at once. Returns the first column that it did not do.
template <bool kToLanes>
int64_t CrossPixels(const PlainMap& p, const Sheet& m, int64_t row, int64_t begin, int64_t last) {
  const int64_t end = AtMost(last, WholeCols(m, row));
  if (end <= begin) return begin;
  if (m.channels < kSquare) return CrossFewChannels<kToLanes>(p, m, row, begin, end);
  const int64_t stride = m.channel_stride;
  for (int64_t c = 0; c < m.channels; c += kLanes) {
    const int64_t first = AtMost(c, m.channels - kSquare), count = AtMost(kLanes, m.channels - first);
    float* pixels[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      pixels[lane] = p.data + first + PlainOffset(p, m, lane, row, begin);
    }
    for (int64_t col = begin; col < end; ++col) {
      float* vectors = m.At(0, first, row, col);
      CrossSquares<kToLanes>(pixels, [=](int64_t i) { return vectors + i * stride; }, count, true);
      for (float*& pixel : pixels) {
        pixel += p.col_stride;
        Prefetch(pixel + kAhead * p.col_stride);
      }
    }
  }
  return end;
}
#else
template <bool kToLanes>
int64_t CrossRow(float* const*, const LaneMap&, float*, int64_t) {
  return 0;
}
template <bool kToLanes>
int64_t CrossPixels(const PlainMap&, const LaneMap&, int64_t, int64_t begin, int64_t) {
  return begin;
}
#endif

// Row-contiguous tensors: 16 columns of 16 blocks at a time, one transpose.
void RowToLanes(float* const* pixels, const Sheet& m, float* out, int64_t row) {
  for (int64_t col = CrossRow<true>(pixels, m, out, row); col < m.block_w; col += kLanes) {
    const int64_t cols = AtMost(kLanes, m.block_w - col);
    V v[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t live = LivePixels(m, lane, row, col, cols);
      v[lane] = live ? LoadPart(pixels[lane] + col, live) : Zero();
    }
    Transpose16(v);
    for (int64_t i = 0; i < cols; ++i) Store(out + (col + i) * kLanes, v[i]);
  }
}

void RowFromLanes(float* const* pixels, float* in, const Sheet& m, int64_t row) {
  if (m.grid == kGrid && m.height == 1 && m.width == 1) {  // what a classifier ends with
    if (row == 0) *pixels[0] = *in;
    return;
  }
  for (int64_t col = CrossRow<false>(pixels, m, in, row); col < m.block_w; col += kLanes) {
    const int64_t cols = AtMost(kLanes, m.block_w - col);
    V v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) v[i] = i < cols ? Load(in + (col + i) * kLanes) : Zero();
    Transpose16(v);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t live = LivePixels(m, lane, row, col, cols);
      if (live) StorePart(pixels[lane] + col, v[lane], live);
    }
  }
}

// Channel-contiguous tensors: 16 channels of 16 blocks' pixels, one transpose.
void PixelsToLanes(const PlainMap& p, const Sheet& m, int64_t row, int64_t begin, int64_t end) {
  for (int64_t col = CrossPixels<true>(p, m, row, begin, end); col < end; ++col) {
    for (int64_t c = 0; c < m.channels; c += kLanes) {
      const int64_t count = AtMost(kLanes, m.channels - c);
      V v[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        v[lane] =
            LivePixels(m, lane, row, col, 1) ? LoadPart(p.data + c + PlainOffset(p, m, lane, row, col), count) : Zero();
      }
      Transpose16(v);
      for (int64_t i = 0; i < count; ++i) Store(m.At(0, c + i, row, col), v[i]);
    }
  }
}

void PixelsFromLanes(const Sheet& m, const PlainMap& p, int64_t row, int64_t begin, int64_t end) {
  for (int64_t col = CrossPixels<false>(p, m, row, begin, end); col < end; ++col) {
    for (int64_t c = 0; c < m.channels; c += kLanes) {
      const int64_t count = AtMost(kLanes, m.channels - c);
      V v[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) v[i] = i < count ? Load(m.At(0, c + i, row, col)) : Zero();
      Transpose16(v);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (LivePixels(m, lane, row, col, 1)) {
          StorePart(p.data + c + PlainOffset(p, m, lane, row, col), v[lane], count);
        }
      }
    }
  }
}

// Any strides, pixel by pixel.
template <bool kToLanes>
void RowAnyStride(float* const* pixels, int64_t col_stride, const Sheet& m, float* vectors, int64_t row) {
  for (int64_t col = 0; col < m.block_w; ++col) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool live = LivePixels(m, lane, row, col, 1);
      float* pixel = pixels[lane] + col * col_stride;
      float* at = vectors + col * kLanes + lane;
      if (kToLanes) {
        *at = live ? *pixel : 0.0f;
      } else if (live) {
        *pixel = *at;
      }
    }
  }
}

// Sheet by sheet, and in a sheet channel by channel, or some columns of a row of a tensor whose pixels are contiguous.
template <bool kToLanes>
void Convert(const PlainMap& plain, const LaneMap& lanes, int threads) {
  const bool by_pixel = plain.channel_stride == 1 && plain.col_stride != 1;
  const int64_t across = (lanes.block_w + kColsAtOnce - 1) / kColsAtOnce;
  const int64_t parts = by_pixel ? lanes.block_h * across : lanes.channels;
  ParallelFor(threads, lanes.batch * parts, [&](int64_t i) {
    const int64_t n = i / parts, part = i % parts;
    const PlainMap p = SheetOf(plain, lanes, n);
    const Sheet m = SheetOf(lanes, plain, n);
    if (by_pixel) {
      const int64_t row = part / across, begin = part % across * kColsAtOnce;
      const int64_t end = AtMost(begin + kColsAtOnce, m.block_w);
      return kToLanes ? PixelsToLanes(p, m, row, begin, end) : PixelsFromLanes(m, p, row, begin, end);
    }
    float* plane = p.data + part * p.channel_stride;
    float* pixels[kLanes];  // where the row begins in each block
    for (int lane = 0; lane < kLanes; ++lane) pixels[lane] = plane + PlainOffset(p, m, lane, 0, 0);
    for (int64_t row = 0; row < m.block_h; ++row) {
      float* vectors = m.At(0, part, row);
      if (p.col_stride != 1) {
        RowAnyStride<kToLanes>(pixels, p.col_stride, m, vectors, row);
      } else {
        kToLanes ? RowToLanes(pixels, m, vectors, row) : RowFromLanes(pixels, vectors, m, row);
      }
      for (float*& pixel : pixels) pixel += p.row_stride;
    }
  });
}

void FromPlain(const PlainMap& from, const LaneMap& to, int threads) { Convert<true>(from, to, threads); }

void ToPlain(const LaneMap& from, const PlainMap& to, int threads) { Convert<false>(to, from, threads); }

void FillHalo(const LaneMap& m, Padding mode, int64_t pad, int threads) {
  const HaloFiller filler(m, mode, pad);
  const int64_t planes = m.batch * m.channels;
  ParallelFor(threads, planes, [&](int64_t i) {
    // The next plane, which the same thread takes next.
    if (i + 1 < planes) filler.Fetch(m.At((i + 1) / m.channels, (i + 1) % m.channels));
    filler.Fill(m.At(i / m.channels, i % m.channels));
  });
}

// What lies at each position of a block once an axis is cut anew; dead pixels become zero.
std::vector<LaneRule> Recut(const Axis& from, int64_t block, bool rows) {
  std::vector<LaneRule> rules;
  for (int64_t position = 0; position < block; ++position) {
    AxisRule rule = {};
    for (int64_t g = 0; g < from.grid; ++g) {
      const int64_t at = g * block + position;
      rule.from[g] = at < from.side ? static_cast<int>(at / from.block) : -1;
      rule.source[g] = at % from.block;
    }
    rules.push_back(ToLanes(rule, from.grid, rows));
  }
  return rules;
}

void CopyBlocks(const LaneMap& from, const LaneMap& to, int threads) {
  ParallelFor(threads, to.batch * to.channels, [&](int64_t i) {
    const int64_t n = i / to.channels, c = i % to.channels;
    for (int64_t y = 0; y < to.block_h; ++y) {
      std::memcpy(to.At(n, c, y), from.At(n, c, y), sizeof(float) * kLanes * to.block_w);
    }
  });
}

// First along rows, into a strip of columns as they shall be, then along columns.
void Reblock(const LaneMap& from, const LaneMap& to, int threads) {
  if (from.block_h == to.block_h && from.block_w == to.block_w) return CopyBlocks(from, to, threads);
  const std::vector<LaneRule> rows = Recut(from.rows(), to.block_h, true);
  const std::vector<LaneRule> columns = Recut(from.columns(), to.block_w, false);
  constexpr int64_t kStrip = 8;  // columns
  ParallelFor(threads, to.batch * to.channels, [&](int64_t i) {
    const int64_t n = i / to.channels, c = i % to.channels;
    std::vector<Vector> strip(kStrip * from.block_h);
    for (int64_t first = 0; first < to.block_w; first += kStrip) {
      const int64_t count = AtMost(kStrip, to.block_w - first);
      for (int64_t y = 0; y < from.block_h; ++y) {
        for (int64_t x = 0; x < count; ++x) {
          Gather(columns[first + x], from.At(n, c, y), kLanes, strip[y * kStrip + x].lanes);
        }
      }
      for (int64_t y = 0; y < to.block_h; ++y) {
        for (int64_t x = 0; x < count; ++x) {
          Gather(rows[y], strip[x].lanes, kStrip * kLanes, to.At(n, c, y, first + x));
        }
      }
    }
  });
}

}  // namespace

extern const LaneKernels lane_kernels;
const LaneKernels lane_kernels = {FromPlain, ToPlain, FillHalo, Reblock};

}  // namespace LIPFAST_NS
}  // namespace lipfast
