#include "cpu/taps.h"

#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

constexpr int kTileRows = kRegisters >= 32 ? 2 : 1;
constexpr int kTileCols = kRegisters >= 32 ? 8 : kRegisters >= 8 ? 6 : 4;

int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// A region cut into tiles of nearly equal size.
struct Tiling {
  int64_t down, across;
  explicit Tiling(const Region& g) : down(Parts(g.rows, kTileRows)), across(Parts(g.cols, kTileCols)) {}
  int64_t count() const { return down * across; }
};

struct Tile {
  int64_t row, col, rows, cols;
};

Tile TileAt(const Region& g, const Tiling& t, int64_t i) {
  const int64_t down = i / t.across, across = i % t.across;
  const int64_t row = g.rows * down / t.down, col = g.cols * across / t.across;
  return {row, col, g.rows * (down + 1) / t.down - row, g.cols * (across + 1) / t.across - col};
}

struct SparseTask {
  const Region* region;
  const TapList* taps;
  const float* values;
  const float* bias;
  float* partial;
  Tile tile;
  int64_t first, last;  // output channels
};

template <int kRows, int kCols>
inline __attribute__((always_inline)) void AddTap(V weight, const float* in, int64_t in_row, int64_t in_col,
                                                  V (&sum)[kRows][kCols]) {
  LIPFAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LIPFAST_UNROLL
    for (int c = 0; c < kCols; ++c) sum[r][c] = Fma(weight, Load(in + r * in_row + c * in_col), sum[r][c]);
  }
}

// One tile, `first` to `last` output channels: sums stay in registers while the
// taps of one block of input channels pass; the tile of the input stays in L1 while
// the output channels pass over it. Strides in vectors; 0 is read from the region.
template <int kRows, int kCols, int kIn, int kOut>
void AccumulateTile(const SparseTask& task) {
  constexpr int kVectors = kRows * kCols;
  constexpr int kChains = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : 4;  // hides the FMA's latency
  const Region& g = *task.region;
  const int64_t blocks = task.taps->blocks, last = task.last;
  const int32_t* offsets = task.taps->offsets;
  const float* values = task.values;
  const int64_t in_row = g.in_row, out_row = g.out_row;
  const int64_t in_col = kIn ? kIn * kLanes : g.in_col, out_col = kOut ? kOut * kLanes : g.out_col;
  const float* in = g.in + task.tile.row * in_row + task.tile.col * in_col;
  for (int64_t b = 0; b < blocks; ++b) {
    float* out = g.out + task.tile.row * out_row + task.tile.col * out_col + task.first * g.out_channel;
    const int32_t* start = task.taps->starts + task.first * (blocks + 1) + b;
    for (int64_t o = task.first; o < last; ++o, out += g.out_channel, start += blocks + 1) {
      int32_t t = start[0];
      const int32_t end = start[1];
      V sum[kChains][kRows][kCols];
      if (b == 0) {
        const V bias = task.bias ? Set(task.bias[o]) : Zero();
        LIPFAST_UNROLL
        for (int i = 0; i < kVectors; ++i) sum[0][i / kCols][i % kCols] = bias;
      } else {
        LIPFAST_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          sum[0][i / kCols][i % kCols] = Load(out + i / kCols * out_row + i % kCols * out_col);
        }
      }
      LIPFAST_UNROLL
      for (int i = kVectors; i < kChains * kVectors; ++i) sum[i / kVectors][i % kVectors / kCols][i % kCols] = Zero();
      for (; t + kChains <= end; t += kChains) {
        LIPFAST_UNROLL
        for (int k = 0; k < kChains; ++k) {
          AddTap<kRows, kCols>(Set(values[t + k]), in + offsets[t + k], in_row, in_col, sum[k]);
        }
      }
      if (kChains > 1) {
        for (; t < end; ++t) AddTap<kRows, kCols>(Set(values[t]), in + offsets[t], in_row, in_col, sum[0]);
      }
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        V total = sum[0][i / kCols][i % kCols];
        LIPFAST_UNROLL
        for (int k = 1; k < kChains; ++k) total = Add(total, sum[k][i / kCols][i % kCols]);
        Store(out + i / kCols * out_row + i % kCols * out_col, total);
      }
    }
  }
}

// The tile of the output gradient stays in registers; each tap adds one dot product,
// lane by lane, to its vector in `partial`.
template <int kRows, int kCols, int kIn, int kOut>
void DotTile(const SparseTask& task) {
  constexpr int kVectors = kRows * kCols;
  constexpr int kChains = kVectors >= 4 ? 4 : kVectors;
  const Region& g = *task.region;
  const int64_t blocks = task.taps->blocks, last = task.last;
  const int32_t* offsets = task.taps->offsets;
  const int64_t in_row = g.in_row, out_row = g.out_row;
  const int64_t in_col = kIn ? kIn * kLanes : g.in_col, out_col = kOut ? kOut * kLanes : g.out_col;
  const float* in = g.in + task.tile.row * in_row + task.tile.col * in_col;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* out = g.out + task.tile.row * out_row + task.tile.col * out_col + task.first * g.out_channel;
    const int32_t* start = task.taps->starts + task.first * (blocks + 1) + b;
    for (int64_t o = task.first; o < last; ++o, out += g.out_channel, start += blocks + 1) {
      V d[kVectors];
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) d[i] = Load(out + i / kCols * out_row + i % kCols * out_col);
      for (int32_t t = start[0]; t < start[1]; ++t) {
        const float* x = in + offsets[t];
        float* partial = task.partial + static_cast<int64_t>(t) * kLanes;
        V sum[kChains];
        sum[0] = Load(partial);
        LIPFAST_UNROLL
        for (int k = 1; k < kChains; ++k) sum[k] = Zero();
        LIPFAST_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          sum[i % kChains] = Fma(d[i], Load(x + i / kCols * in_row + i % kCols * in_col), sum[i % kChains]);
        }
        LIPFAST_UNROLL
        for (int k = 1; k < kChains; ++k) sum[0] = Add(sum[0], sum[k]);
        Store(partial, sum[0]);
      }
    }
  }
}

using TileFunction = void (*)(const SparseTask&);

template <int kRows, int kCols, int kIn, int kOut>
struct Accumulate {
  static void Run(const SparseTask& task) { AccumulateTile<kRows, kCols, kIn, kOut>(task); }
};
template <int kRows, int kCols, int kIn, int kOut>
struct Dot {
  static void Run(const SparseTask& task) { DotTile<kRows, kCols, kIn, kOut>(task); }
};

template <template <int, int, int, int> class Kernel, int kRows, int kIn, int kOut>
TileFunction WithCols(int64_t cols) {
  static const TileFunction table[] = {
      Kernel<kRows, 1, kIn, kOut>::Run, Kernel<kRows, 2, kIn, kOut>::Run,
      Kernel<kRows, 3, kIn, kOut>::Run, Kernel<kRows, 4, kIn, kOut>::Run,
#if LIPFAST_TARGET > 0
      Kernel<kRows, 5, kIn, kOut>::Run, Kernel<kRows, 6, kIn, kOut>::Run,
#endif
#if LIPFAST_TARGET == 2
      Kernel<kRows, 7, kIn, kOut>::Run, Kernel<kRows, 8, kIn, kOut>::Run,
#endif
  };
  return table[cols - 1];
}

template <template <int, int, int, int> class Kernel, int kIn, int kOut>
TileFunction WithRows(const Tile& tile) {
  return tile.rows == 1 ? WithCols<Kernel, 1, kIn, kOut>(tile.cols) : WithCols<Kernel, kTileRows, kIn, kOut>(tile.cols);
}

template <template <int, int, int, int> class Kernel>
TileFunction ForTile(const Tile& tile, const Region& g) {
  if (g.in_col == kLanes && g.out_col == kLanes) return WithRows<Kernel, 1, 1>(tile);
  if (g.in_col == 2 * kLanes && g.out_col == kLanes) return WithRows<Kernel, 2, 1>(tile);
  if (g.in_col == kLanes && g.out_col == 2 * kLanes) return WithRows<Kernel, 1, 2>(tile);
  return WithRows<Kernel, 0, 0>(tile);
}

// Finds which region the i-th tile of all regions lies in.
SparseTask TaskAt(const Region* regions, int64_t i) {
  SparseTask task = {};
  task.region = regions;
  Tiling tiling(*task.region);
  while (i >= tiling.count()) {
    i -= tiling.count();
    tiling = Tiling(*++task.region);
  }
  task.tile = TileAt(*task.region, tiling, i);
  return task;
}

int64_t TileCount(const Region* regions, int64_t count) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) tiles += Tiling(regions[i]).count();
  return tiles;
}

constexpr int64_t kEnoughChunks = 16;

// Few tiles: output channels are split as well, so that all threads have work.
int64_t OutputParts(int64_t tiles, int64_t outputs) { return Least(Parts(kEnoughChunks, tiles), Parts(outputs, 8)); }

void SparseAccumulate(const Region* regions, int64_t count, const TapList& taps, const float* values, const float* bias,
                      int threads) {
  const int64_t tiles = TileCount(regions, count);
  if (tiles == 0) return;
  const int64_t parts = OutputParts(tiles, taps.outputs);
  ParallelFor(threads, tiles * parts, [&](int64_t chunk) {
    SparseTask task = TaskAt(regions, chunk / parts);
    task.taps = &taps;
    task.values = values;
    task.bias = bias;
    task.first = taps.outputs * (chunk % parts) / parts;
    task.last = taps.outputs * (chunk % parts + 1) / parts;
    ForTile<Accumulate>(task.tile, *task.region)(task);
  });
}

// Chunks of tiles with sums of their own: enough for a few threads, few enough that
// adding them up costs nothing.
int64_t DotChunks(const Region* regions, int64_t count) { return Least(TileCount(regions, count), 4); }

void SparseDot(const Region* regions, int64_t count, const TapList& taps, float* partial, float* d_values,
               int threads) {
  const int64_t tiles = TileCount(regions, count), chunks = DotChunks(regions, count);
  const int64_t parts = OutputParts(chunks, taps.outputs);
  const int64_t total = taps.starts[taps.outputs * (taps.blocks + 1) - 1];
  ParallelFor(threads, chunks * parts, [&](int64_t i) {
    const int64_t chunk = i / parts, part = i % parts;
    const int64_t first = taps.outputs * part / parts, last = taps.outputs * (part + 1) / parts;
    float* sums = partial + chunk * total * kLanes;
    const int64_t begin = taps.starts[first * (taps.blocks + 1)];
    const int64_t end = taps.starts[last * (taps.blocks + 1) - 1];
    std::memset(sums + begin * kLanes, 0, sizeof(float) * kLanes * (end - begin));
    for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; ++tile) {
      SparseTask task = TaskAt(regions, tile);
      task.taps = &taps;
      task.partial = sums;
      task.first = first;
      task.last = last;
      ForTile<Dot>(task.tile, *task.region)(task);
    }
  });
  constexpr int64_t kTapsPerChunk = 4096;
  ParallelFor(threads, Parts(total, kTapsPerChunk), [&](int64_t i) {
    for (int64_t t = i * kTapsPerChunk; t < Least((i + 1) * kTapsPerChunk, total); ++t) {
      V sum = chunks ? Load(partial + t * kLanes) : Zero();
      for (int64_t c = 1; c < chunks; ++c) sum = Add(sum, Load(partial + (c * total + t) * kLanes));
      d_values[t] = Sum(sum);
    }
  });
}

}  // namespace

extern const TapKernels tap_kernels;
const TapKernels tap_kernels = {SparseAccumulate, SparseDot, DotChunks, nullptr,   nullptr,
                                nullptr,          nullptr,   4,         kTileRows, kTileCols};

}  // namespace LIPFAST_NS
}  // namespace lipfast
