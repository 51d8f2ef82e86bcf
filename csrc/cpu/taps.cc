#include "cpu/taps.h"

#include "cpu/ahead.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

constexpr int kTileRows = kRegisters >= 32 ? 2 : 1;
constexpr int kTileCols = kRegisters >= 32 ? 8 : kRegisters >= 8 ? 6 : 4;
constexpr int64_t kFirstLevel = (LIPFAST_TARGET == 2 ? 48 : 32) << 10;

int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t Parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// A region cut into tiles of nearly equal size.
struct Tiling {
  int64_t down, across;
  Tiling(const Region& g, int64_t rows) : down(Parts(g.rows, rows)), across(Parts(g.cols, kTileCols)) {}
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
  Ahead* next_in;  // the tile that the thread will take next; null: leave it
  Ahead* next_out;
  int64_t first, last;  // output channels
};

// Keeps the compiler from seeing where a row's address came from: it would compute
// one address per vector, and run out of registers, instead of one per row.
template <class T>
inline __attribute__((always_inline)) T* Row(T* p) {
  asm("" : "+r"(p));
  return p;
}

template <int kRows, int kCols>
inline __attribute__((always_inline)) void AddTap(V weight, const float* in, int64_t in_row, int64_t in_col,
                                                  V (&sum)[kRows][kCols]) {
  LIPFAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float* row = Row(in + r * in_row);
    LIPFAST_UNROLL
    for (int c = 0; c < kCols; ++c) sum[r][c] = Fma(weight, Load(row + c * in_col), sum[r][c]);
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
      if (task.next_in) StepBoth(task.next_in, task.next_out);
      int32_t t = start[0];
      const int32_t end = start[1];
      V sum[kChains][kRows][kCols];
      if (b == 0) {
        const V bias = task.bias ? Set(task.bias[o]) : Zero();
        LIPFAST_UNROLL
        for (int i = 0; i < kVectors; ++i) sum[0][i / kCols][i % kCols] = bias;
      } else {
        LIPFAST_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const float* row = Row(out + r * out_row);
          LIPFAST_UNROLL
          for (int c = 0; c < kCols; ++c) sum[0][r][c] = Load(row + c * out_col);
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
      for (int r = 0; r < kRows; ++r) {
        float* row = Row(out + r * out_row);
        LIPFAST_UNROLL
        for (int c = 0; c < kCols; ++c) {
          V total = sum[0][r][c];
          LIPFAST_UNROLL
          for (int k = 1; k < kChains; ++k) total = Add(total, sum[k][r][c]);
          Store(row + c * out_col, total);
        }
      }
    }
  }
}

// Adds the sums of the first `count` of sixteen vectors to as many floats.
inline __attribute__((always_inline)) void AddSums(float* vectors, int count, float* to) {
  for (int i = count; i < kLanes; ++i) Store(vectors + i * kLanes, Zero());
  StorePart(to, Add(LoadPart(to, count), SumEach(vectors)), count);
}

// The tile of the output gradient stays in registers; each tap adds one dot product
// to its float in `partial`.
template <int kRows, int kCols, int kIn, int kOut>
void DotTile(const SparseTask& task) {
  constexpr int kVectors = kRows * kCols;
  constexpr int kChains = kVectors >= 2 ? 2 : 1;
  const Region& g = *task.region;
  const int64_t blocks = task.taps->blocks, last = task.last;
  const int32_t* offsets = task.taps->offsets;
  const int64_t in_row = g.in_row, out_row = g.out_row;
  const int64_t in_col = kIn ? kIn * kLanes : g.in_col, out_col = kOut ? kOut * kLanes : g.out_col;
  const float* in = g.in + task.tile.row * in_row + task.tile.col * in_col;
  alignas(64) float vectors[kLanes * kLanes];  // of the last taps; sixteen are summed up together
  for (int64_t b = 0; b < blocks; ++b) {
    const float* out = g.out + task.tile.row * out_row + task.tile.col * out_col + task.first * g.out_channel;
    const int32_t* start = task.taps->starts + task.first * (blocks + 1) + b;
    float* to = task.partial + task.taps->visits[task.first * blocks + b];
    int waiting = 0;
    for (int64_t o = task.first; o < last; ++o, out += g.out_channel, start += blocks + 1) {
      V d[kRows][kCols];
      LIPFAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float* row = Row(out + r * out_row);
        LIPFAST_UNROLL
        for (int c = 0; c < kCols; ++c) d[r][c] = Load(row + c * out_col);
      }
      for (int32_t t = start[0]; t < start[1]; ++t) {
        const float* x = in + offsets[t];
        V sum[kChains];
        LIPFAST_UNROLL
        for (int k = 0; k < kChains; ++k) sum[k] = Zero();
        LIPFAST_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const float* row = Row(x + r * in_row);
          LIPFAST_UNROLL
          for (int c = 0; c < kCols; ++c) {
            V& chain = sum[(r * kCols + c) % kChains];
            chain = Fma(d[r][c], Load(row + c * in_col), chain);
          }
        }
        Store(vectors + waiting * kLanes, kChains == 2 ? Add(sum[0], sum[kChains - 1]) : sum[0]);
        if (++waiting == kLanes) {
          StoreU(to, Add(LoadU(to), SumEach(vectors)));
          to += kLanes;
          waiting = 0;
        }
      }
    }
    if (waiting) AddSums(vectors, waiting, to);
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
SparseTask TaskAt(const Region* regions, int64_t tile_rows, int64_t i) {
  SparseTask task = {};
  task.region = regions;
  Tiling tiling(*task.region, tile_rows);
  while (i >= tiling.count()) {
    i -= tiling.count();
    tiling = Tiling(*++task.region, tile_rows);
  }
  task.tile = TileAt(*task.region, tiling, i);
  return task;
}

int64_t TileCount(const Region* regions, int64_t count, int64_t tile_rows) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) tiles += Tiling(regions[i], tile_rows).count();
  return tiles;
}

constexpr int64_t kEnoughChunks = 16;

// Few tiles: output channels are split as well, so that all threads have work.
int64_t OutputParts(int64_t tiles, int64_t outputs) { return Least(Parts(kEnoughChunks, tiles), Parts(outputs, 8)); }

void SparseAccumulate(const Region* regions, int64_t count, const TapList& taps, const float* values, const float* bias,
                      int threads) {
  const int64_t tiles = TileCount(regions, count, taps.tile_rows);
  if (tiles == 0) return;
  const int64_t parts = OutputParts(tiles, taps.outputs);
  ParallelFor(threads, tiles * parts, [&](int64_t chunk) {
    SparseTask task = TaskAt(regions, taps.tile_rows, chunk / parts);
    task.taps = &taps;
    task.values = values;
    task.bias = bias;
    task.first = taps.outputs * (chunk % parts) / parts;
    task.last = taps.outputs * (chunk % parts + 1) / parts;
    Ahead next_in, next_out;
    if (taps.look_ahead && chunk / parts + 1 < tiles) {
      const SparseTask next = TaskAt(regions, taps.tile_rows, chunk / parts + 1);
      const Region& g = *next.region;
      const Tile& tile = next.tile;
      const int64_t outputs = task.last - task.first, steps = taps.blocks * outputs;
      next_in = Ahead(g.in + tile.row * g.in_row + tile.col * g.in_col, taps.inputs, tile.rows, tile.cols, g.in_channel,
                      g.in_row, g.in_col, steps);
      next_out = Ahead(g.out + tile.row * g.out_row + tile.col * g.out_col + task.first * g.out_channel, outputs,
                       tile.rows, tile.cols, g.out_channel, g.out_row, g.out_col, steps);
      task.next_in = &next_in;
      task.next_out = &next_out;
    }
    ForTile<Accumulate>(task.tile, *task.region)(task);
  });
}

// The first of `chunks` arrays becomes the sum of all, in order.
void AddChunks(float* sums, int64_t chunks, int64_t size, int threads) {
  constexpr int64_t kPerTask = 4096;
  ParallelFor(threads, chunks > 1 ? Parts(size, kPerTask) : 0, [&](int64_t i) {
    const int64_t last = Least((i + 1) * kPerTask, size);
    for (int64_t j = i * kPerTask; j < last; j += kLanes) {
      const int n = static_cast<int>(Least(kLanes, last - j));
      V sum = LoadPart(sums + j, n);
      for (int64_t c = 1; c < chunks; ++c) sum = Add(sum, LoadPart(sums + c * size + j, n));
      StorePart(sums + j, sum, n);
    }
  });
}

// Chunks of tiles with sums of their own: enough for many threads, few enough that
// adding them up costs nothing.
int64_t DotChunks(const Region* regions, int64_t count, const TapList& taps) {
  return Most(1, Least(TileCount(regions, count, taps.tile_rows), kEnoughChunks));
}

void SparseDot(const Region* regions, int64_t count, const TapList& taps, float* partial, float* d_values,
               int threads) {
  const int64_t tiles = TileCount(regions, count, taps.tile_rows), chunks = DotChunks(regions, count, taps);
  const int64_t parts = OutputParts(chunks, taps.outputs), blocks = taps.blocks;
  const int64_t total = taps.starts[taps.outputs * (blocks + 1) - 1];
  std::memset(partial, 0, sizeof(float) * chunks * total);
  ParallelFor(threads, chunks * parts, [&](int64_t i) {
    const int64_t chunk = i / parts, part = i % parts;
    for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; ++tile) {
      SparseTask task = TaskAt(regions, taps.tile_rows, tile);
      task.taps = &taps;
      task.partial = partial + chunk * total;
      task.first = taps.outputs * part / parts;
      task.last = taps.outputs * (part + 1) / parts;
      ForTile<Dot>(task.tile, *task.region)(task);
    }
  });
  AddChunks(partial, chunks, total, threads);
  ParallelFor(threads, taps.outputs, [&](int64_t o) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t* start = taps.starts + o * (blocks + 1) + b;
      const float* sums = partial + taps.visits[o * blocks + b];
      for (int32_t t = start[0]; t < start[1]; ++t) d_values[t] = *sums++;
    }
  });
}

// --- dense ---------------------------------------------------------------------

constexpr int kGroup = 4;                             // output channels that share a load of the input
constexpr int kDenseCols = kRegisters >= 32 ? 6 : 1;  // kGroup * kDenseCols sums in registers
constexpr int64_t kDenseBlock = 72;                   // taps between two visits of a sum to memory
constexpr int kDotTaps = kRegisters >= 32 ? 6 : 1;    // kGroup * kDotTaps sums in registers

constexpr int64_t kDotVectors = 96;  // positions whose output gradients stay in the first cache level

struct DenseTask {
  const Region* region;
  const DenseTaps* taps;
  const float* weights;
  const float* bias;
  int64_t row, col;
  int64_t first, last;  // groups of output channels
};

template <int kCols, int kIn, int kOut>
void DenseTile(const DenseTask& task) {
  const Region& g = *task.region;
  const int64_t in_col = kIn ? kIn * kLanes : g.in_col, out_col = kOut ? kOut * kLanes : g.out_col;
  const int64_t count = task.taps->taps, outputs = task.taps->outputs;
  const int32_t* offsets = task.taps->offsets;
  const float* in = g.in + task.row * g.in_row + task.col * in_col;
  float* tile_out = g.out + task.row * g.out_row + task.col * out_col;
  for (int64_t begin = 0; begin == 0 || begin < count; begin += kDenseBlock) {
    const int64_t end = Least(begin + kDenseBlock, count);
    for (int64_t group = task.first; group < task.last; ++group) {
      float* out = tile_out + group * kGroup * g.out_channel;
      const int live = static_cast<int>(Least(kGroup, outputs - group * kGroup));
      V sum[kGroup][kCols];
      LIPFAST_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        LIPFAST_UNROLL
        for (int c = 0; c < kCols; ++c) sum[k][c] = Zero();
      }
      if (begin > 0 || task.bias) {
        LIPFAST_UNROLL
        for (int k = 0; k < kGroup; ++k) {
          if (k >= live) continue;
          const float* row = Row(out + k * g.out_channel);
          LIPFAST_UNROLL
          for (int c = 0; c < kCols; ++c) {
            sum[k][c] = begin ? Load(row + c * out_col) : Set(task.bias[group * kGroup + k]);
          }
        }
      }
      // The next tile's input, a share with every group: its lines come from far away.
      const int64_t share = task.last - task.first;
      const int64_t ahead = begin + (end - begin) * (group - task.first + 1) / share;
      for (int64_t t = begin + (end - begin) * (group - task.first) / share; t < ahead; ++t) {
        LIPFAST_UNROLL
        for (int c = 0; c < kCols; ++c) Prefetch(in + offsets[t] + (kCols + c) * in_col);
      }
      const float* w = task.weights + (group * count + begin) * kGroup;
      for (int64_t t = begin; t < end; ++t, w += kGroup) {
        const float* x = Row(in + offsets[t]);
        V v[kCols];
        LIPFAST_UNROLL
        for (int c = 0; c < kCols; ++c) v[c] = Load(x + c * in_col);
        LIPFAST_UNROLL
        for (int k = 0; k < kGroup; ++k) {
          const V weight = Set(w[k]);
          LIPFAST_UNROLL
          for (int c = 0; c < kCols; ++c) sum[k][c] = Fma(weight, v[c], sum[k][c]);
        }
      }
      LIPFAST_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        if (k >= live) continue;
        float* row = Row(out + k * g.out_channel);
        LIPFAST_UNROLL
        for (int c = 0; c < kCols; ++c) Store(row + c * out_col, sum[k][c]);
      }
    }
  }
}

using DenseFunction = void (*)(const DenseTask&);

template <int kIn, int kOut>
DenseFunction DenseWithCols(int64_t cols) {
  static const DenseFunction table[] = {
      DenseTile<1, kIn, kOut>,
#if LIPFAST_TARGET == 2
      DenseTile<2, kIn, kOut>, DenseTile<3, kIn, kOut>, DenseTile<4, kIn, kOut>,
      DenseTile<5, kIn, kOut>, DenseTile<6, kIn, kOut>,
#endif
  };
  return table[cols - 1];
}

DenseFunction ForColumns(int64_t cols, const Region& g) {
  if (g.in_col == kLanes && g.out_col == kLanes) return DenseWithCols<1, 1>(cols);
  if (g.in_col == 2 * kLanes && g.out_col == kLanes) return DenseWithCols<2, 1>(cols);
  if (g.in_col == kLanes && g.out_col == 2 * kLanes) return DenseWithCols<1, 2>(cols);
  return DenseWithCols<0, 0>(cols);
}

int64_t RowCount(const Region* regions, int64_t count) {
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows += regions[i].rows;
  return rows;
}

const Region* RegionOfRow(const Region* regions, int64_t* row) {
  for (; *row >= regions->rows; ++regions) *row -= regions->rows;
  return regions;
}

void DenseAccumulate(const Region* regions, int64_t count, const DenseTaps& taps, const float* weights,
                     const float* bias, int threads) {
  const int64_t rows = RowCount(regions, count), groups = Parts(taps.outputs, kGroup);
  if (rows == 0) return;
  const int64_t parts = Least(Parts(kEnoughChunks, rows), groups);
  ParallelFor(threads, rows * parts, [&](int64_t chunk) {
    DenseTask task = {nullptr,
                      &taps,
                      weights,
                      bias,
                      chunk / parts,
                      0,
                      groups * (chunk % parts) / parts,
                      groups * (chunk % parts + 1) / parts};
    task.region = RegionOfRow(regions, &task.row);
    const int64_t across = Parts(task.region->cols, kDenseCols);
    for (int64_t i = 0; i < across; ++i) {
      task.col = task.region->cols * i / across;
      ForColumns(task.region->cols * (i + 1) / across - task.col, *task.region)(task);
    }
  });
}

// kGroup output channels times kTaps taps over rows [row, last) of a region.
template <int kTaps>
void DenseDotRows(const Region& g, int64_t row, int64_t last, const int32_t* offsets, int64_t group, int live,
                  float* sums, int64_t sums_stride) {
  V sum[kGroup][kTaps];
  LIPFAST_UNROLL
  for (int k = 0; k < kGroup; ++k) {
    LIPFAST_UNROLL
    for (int t = 0; t < kTaps; ++t) sum[k][t] = Zero();
  }
  for (; row < last; ++row) {
    const float* dy[kGroup];
    LIPFAST_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      dy[k] = g.out + (group * kGroup + (k < live ? k : 0)) * g.out_channel + row * g.out_row;
    }
    const float* x[kTaps];
    LIPFAST_UNROLL
    for (int t = 0; t < kTaps; ++t) x[t] = g.in + row * g.in_row + offsets[t];
    int64_t at_out = 0, at_in = 0;
    for (int64_t col = 0; col < g.cols; ++col, at_out += g.out_col, at_in += g.in_col) {
      V d[kGroup];
      LIPFAST_UNROLL
      for (int k = 0; k < kGroup; ++k) d[k] = Load(dy[k] + at_out);
      LIPFAST_UNROLL
      for (int t = 0; t < kTaps; ++t) {
        const V v = Load(x[t] + at_in);
        LIPFAST_UNROLL
        for (int k = 0; k < kGroup; ++k) sum[k][t] = Fma(d[k], v, sum[k][t]);
      }
    }
  }
  LIPFAST_UNROLL
  for (int k = 0; k < kGroup; ++k) {
    if (k >= live) continue;
    LIPFAST_UNROLL
    for (int t = 0; t < kTaps; ++t) sums[k * sums_stride + t] += Sum(sum[k][t]);
  }
}

void DenseDotGroup(const Region& g, int64_t row, int64_t last, const DenseTaps& taps, int64_t group, float* sums) {
  const int live = static_cast<int>(Least(kGroup, taps.outputs - group * kGroup));
  float* out = sums + group * kGroup * taps.taps;
  int64_t t = 0;
  for (; t + kDotTaps <= taps.taps; t += kDotTaps) {
    DenseDotRows<kDotTaps>(g, row, last, taps.offsets + t, group, live, out + t, taps.taps);
  }
  for (; t < taps.taps; ++t) DenseDotRows<1>(g, row, last, taps.offsets + t, group, live, out + t, taps.taps);
}

int64_t DenseDotChunks(const Region* regions, int64_t count) { return Most(1, Least(RowCount(regions, count), 8)); }

void DenseDot(const Region* regions, int64_t count, const DenseTaps& taps, float* partial, int threads) {
  const int64_t rows = RowCount(regions, count), chunks = DenseDotChunks(regions, count);
  const int64_t groups = Parts(taps.outputs, kGroup), parts = OutputParts(chunks, taps.outputs);
  const int64_t size = taps.outputs * taps.taps;
  ParallelFor(threads, chunks * parts, [&](int64_t i) {
    const int64_t chunk = i / parts, part = i % parts;
    const int64_t first = groups * part / parts, last = groups * (part + 1) / parts;
    float* sums = partial + chunk * size;
    const int64_t begin = first * kGroup * taps.taps, end = Least(last * kGroup, taps.outputs) * taps.taps;
    std::memset(sums + begin, 0, sizeof(float) * (end - begin));
    const int64_t line_end = rows * (chunk + 1) / chunks;
    for (int64_t line = rows * chunk / chunks; line < line_end;) {
      int64_t row = line;
      const Region* region = RegionOfRow(regions, &row);
      const int64_t count = Least(Least(Parts(kDotVectors, region->cols), region->rows - row), line_end - line);
      for (int64_t group = first; group < last; ++group) {
        DenseDotGroup(*region, row, row + count, taps, group, sums);
      }
      line += count;
    }
  });
  AddChunks(partial, chunks, size, threads);
}

void ChannelSums(const Region* regions, int64_t count, int64_t channels, float* sums, int threads) {
  ParallelFor(threads, channels, [&](int64_t channel) {
    V total = Zero();
    for (int64_t i = 0; i < count; ++i) {
      const Region& g = regions[i];
      for (int64_t row = 0; row < g.rows; ++row) {
        const float* p = g.out + channel * g.out_channel + row * g.out_row;
        V line = Zero();  // line by line: the rounding error grows with rows + columns, not with pixels
        for (int64_t col = 0; col < g.cols; ++col) line = Add(line, Load(p + col * g.out_col));
        total = Add(total, line);
      }
    }
    sums[channel] = Sum(total);
  });
}

}  // namespace

extern const TapKernels tap_kernels;
const TapKernels tap_kernels = {SparseAccumulate, SparseDot, DotChunks, DenseAccumulate, DenseDot,   DenseDotChunks,
                                ChannelSums,      kGroup,    kTileRows, kTileCols,       kFirstLevel};

}  // namespace LIPFAST_NS
}  // namespace lipfast
