#include "cpu/taps.h"

#include <memory>
#include <utility>

#include "cpu/activation.h"
#include "cpu/halo.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

constexpr int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t Parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// A tile's sums fill the registers but for the weight of this tap and of the next.
constexpr int kTileVectors = kRegisters >= 32 ? 16 : kRegisters >= 8 ? 7 : 3;
// A tile of weight gradients leaves room for two chains of products.
constexpr int kDotTileVectors = kParts == 2 ? 6 : kTileVectors;
constexpr int kTileRows = 2, kTileCols = 8;  // at most, where they fit

struct TileSize {
  int64_t rows, cols;
};

TileSize AccumulateSize(const TapList& taps) { return {taps.tile_rows, Least(kTileVectors, kTileCols)}; }
TileSize DotSize(const TapList& taps) { return {taps.tile_rows, Least(kDotTileVectors, kTileCols)}; }

// A region cut into tiles of nearly equal size.
struct Tiling {
  int64_t down, across;
  Tiling(const Region& g, TileSize most) : down(Parts(g.rows, most.rows)), across(Parts(g.cols, most.cols)) {}
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

// Output channels that a tile takes at once: their sums, or their gradients, wait in
// a buffer that fits the second cache level.
constexpr int64_t kOutputsAtOnce = 128;

struct SparseTask {
  const Region* region;
  const TapList* taps;
  const float* values;
  const float* bias;
  ActivationSpec end;
  float* partial;
  float* sums;  // of the gradients of each output, a vector; null: not wanted
  Tile tile;
  int64_t first, last;  // output channels
  bool ahead;           // fetch the tile that follows even where it reads much of what this one does
  // The tile that the thread takes next; null: there is none.
  const float* next_in;
  const float* next_out;  // of channel 0
  const float* next_residual;
};

constexpr int64_t kLinesAtOnce = 32;  // fetched ahead with an output; more would hold up its own loads

// Brings the next tile into the second cache level, a few lines with every output
// channel: its lines lie in as many pages as there are channels, where no hardware
// prefetcher finds them. A line on its way occupies one of the few places that loads
// from the second level need, too, so this is for tiles of which every line is new, and
// for those `ahead`.
template <int kVectors>
class Upcoming {
 public:
  Upcoming(const SparseTask& task, int64_t block) {
    const Region& g = *task.region;
    const TapList& taps = *task.taps;
    step_ = Parts(taps.fresh_count, task.last - task.first);
    wanted_ = task.next_out && (task.ahead || !taps.overlap) && step_ <= kLinesAtOnce;
    if (!wanted_) return;
    out_ = task.next_out + task.first * g.out_channel;
    out_channel_ = g.out_channel;
    const int64_t first = kVectors * block / taps.blocks, last = kVectors * (block + 1) / taps.blocks;
    const int64_t cols = task.tile.cols;
    residual_ = task.next_residual ? task.next_residual + task.first * g.residual_channel : nullptr;
    residual_channel_ = g.residual_channel;
    _Pragma("GCC unroll 1") for (int64_t i = first; i < last; ++i) {
      residual_lines_[count_] = i / cols * g.residual_row + i % cols * g.out_col;
      lines_[count_++] = i / cols * g.out_row + i % cols * g.out_col;
    }
    if (task.last < taps.outputs) return;  // another part of the outputs fetches the input
    in_ = task.next_in + block * taps.block_stride;
    fresh_ = taps.fresh;
    fresh_end_ = taps.fresh + taps.fresh_count;
  }

  bool wanted() const { return wanted_; }

  // Out of line: its variables would push the caller's out of their registers.
  __attribute__((noinline)) void Step() {
    _Pragma("GCC unroll 1") for (int i = 0; i < count_; ++i) PrefetchFar(out_ + lines_[i]);
    out_ += out_channel_;
    if (residual_) {
      _Pragma("GCC unroll 1") for (int i = 0; i < count_; ++i) PrefetchFar(residual_ + residual_lines_[i]);
      residual_ += residual_channel_;
    }
    const int32_t* stop = fresh_ + Least(step_, fresh_end_ - fresh_);
    _Pragma("GCC unroll 1") for (; fresh_ < stop; ++fresh_) PrefetchFar(in_ + *fresh_);
  }

 private:
  const float *out_ = nullptr, *residual_ = nullptr, *in_ = nullptr;
  int64_t out_channel_ = 0, residual_channel_ = 0, step_ = 0;
  const int32_t *fresh_ = nullptr, *fresh_end_ = nullptr;
  int count_ = 0;
  bool wanted_;
  int64_t lines_[kVectors], residual_lines_[kVectors];
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

// Two neighbours of a list by one load.
class OffsetPair {
 public:
  explicit OffsetPair(const int32_t* at) { std::memcpy(&both_, at, sizeof(both_)); }
  int64_t first() const { return kLittle ? static_cast<int32_t>(both_) : both_ >> 32; }
  int64_t second() const { return kLittle ? both_ >> 32 : static_cast<int32_t>(both_); }

 private:
  static constexpr bool kLittle = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
  int64_t both_;
};

// sum += taps [t, end), one after the other.
template <int kRows, int kCols>
inline __attribute__((always_inline)) void AddTaps(const int32_t* offsets, const float* values, int32_t t, int32_t end,
                                                   const float* in, int64_t in_row, int64_t in_col,
                                                   V (&sum)[kRows][kCols]) {
  const auto add = [&](int32_t tap, int64_t offset) __attribute__((always_inline)) {
    AddTap<kRows, kCols>(Set(values[tap]), in + offset, in_row, in_col, sum);
  };
  if constexpr (kRegisters >= 32) {
    // Loads bound this loop: a multiply-add is one, so an offset should not be one more.
    OffsetPair near(offsets + t), far(offsets + t + 2);
    for (; t + 4 <= end; t += 4) {
      const int64_t a = near.first(), b = near.second();
      near = OffsetPair(offsets + t + 4);
      add(t, a);
      add(t + 1, b);
      const int64_t c = far.first(), d = far.second();
      far = OffsetPair(offsets + t + 6);
      add(t + 2, c);
      add(t + 3, d);
    }
    if (t + 2 <= end) {
      add(t, near.first());
      add(t + 1, near.second());
      near = far;
      t += 2;
    }
    if (t < end) add(t, near.first());
  } else {
    // Weight and offset are fetched a tap ahead: behind a full queue of loads they would hold up the sums.
    V next = Set(values[t]);
    int64_t offset = offsets[t];
    while (t < end) {
      const float* x = in + offset;
      const V weight = next;
      ++t;
      next = Set(values[t]);
      offset = offsets[t];
      AddTap<kRows, kCols>(weight, x, in_row, in_col, sum);
    }
  }
}

// One tile, `first` to `last` output channels: sums stay in registers while the
// taps of one block of input channels pass; the tile of the input stays in L1 while
// the output channels pass over it. Between blocks the sums wait side by side in
// `partial`: in their map they would lie a page apart. Strides in vectors; 0 is read
// from the region.
template <int kRows, int kCols, int kIn, int kOut>
void AccumulateTile(const SparseTask& task) {
  constexpr int kVectors = kRows * kCols;
  constexpr int kSums = kVectors * kParts;
  constexpr int kChains = kSums >= 8 ? 1 : kSums >= 4 ? 2 : 4;  // hides the FMA's latency
  alignas(64) float partial[kOutputsAtOnce * kVectors * kLanes];
  const Region& g = *task.region;
  const int64_t blocks = task.taps->blocks, last = task.last;
  const int32_t* offsets = task.taps->offsets;
  const float* values = task.values;
  const int64_t in_row = g.in_row, out_row = g.out_row;
  const int64_t in_col = kIn ? kIn * kLanes : g.in_col, out_col = kOut ? kOut * kLanes : g.out_col;
  const float* in = g.in + task.tile.row * in_row + task.tile.col * in_col;
  for (int64_t b = 0; b < blocks; ++b) {
    float* out = g.out + task.tile.row * out_row + task.tile.col * out_col + task.first * g.out_channel;
    float* waiting = partial;
    const int32_t* start = task.taps->starts + b * task.taps->outputs + task.first;
    Upcoming<kVectors> upcoming(task, b);
    for (int64_t o = task.first; o < last; ++o, ++start, out += g.out_channel, waiting += kVectors * kLanes) {
      if (upcoming.wanted()) upcoming.Step();
      int32_t t = start[0];
      const int32_t end = start[1];
      V sum[kChains][kRows][kCols];
      if (b == 0) {
        const V bias = task.bias ? Set(task.bias[o]) : Zero();
        LIPFAST_UNROLL
        for (int i = 0; i < kVectors; ++i) sum[0][i / kCols][i % kCols] = bias;
      } else {
        LIPFAST_UNROLL
        for (int i = 0; i < kVectors; ++i) sum[0][i / kCols][i % kCols] = Load(waiting + i * kLanes);
      }
      LIPFAST_UNROLL
      for (int i = kVectors; i < kChains * kVectors; ++i) sum[i / kVectors][i % kVectors / kCols][i % kCols] = Zero();
      if (kChains == 1) {
        AddTaps<kRows, kCols>(offsets, values, t, end, in, in_row, in_col, sum[0]);
      } else {
        for (; t + kChains <= end; t += kChains) {
          LIPFAST_UNROLL
          for (int k = 0; k < kChains; ++k) {
            AddTap<kRows, kCols>(Set(values[t + k]), in + offsets[t + k], in_row, in_col, sum[k]);
          }
        }
        for (; t < end; ++t) AddTap<kRows, kCols>(Set(values[t]), in + offsets[t], in_row, in_col, sum[0]);
      }
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        LIPFAST_UNROLL
        for (int k = 1; k < kChains; ++k) {
          V& total = sum[0][i / kCols][i % kCols];
          total = Add(total, sum[k][i / kCols][i % kCols]);
        }
      }
      if (b + 1 < blocks) {
        LIPFAST_UNROLL
        for (int i = 0; i < kVectors; ++i) Store(waiting + i * kLanes, sum[0][i / kCols][i % kCols]);
        continue;
      }
      if (g.residual) {
        const float* add =
            g.residual + o * g.residual_channel + task.tile.row * g.residual_row + task.tile.col * out_col;
        AddTap<kRows, kCols>(Set(1.0f), add, g.residual_row, out_col, sum[0]);
      }
      LIPFAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float* row = Row(out + r * out_row);
        LIPFAST_UNROLL
        for (int c = 0; c < kCols; ++c) Store(row + c * out_col, SimpleAct(sum[0][r][c], task.end));
      }
    }
  }
}

constexpr int kWaiting = 32;  // taps whose products wait, folded, for their sums: sixteen are taken together

// Adds the sums of the first `count` of sixteen vectors to as many floats.
inline __attribute__((always_inline)) void AddSums(float* vectors, int count, float* to) {
  for (int i = count; i < kLanes; ++i) StoreFolded(vectors + i * kFolded, Zero());
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
  const bool next_ahead = kRegisters >= 32 && SecondLevelIsNear();
  alignas(64) float near[kOutputsAtOnce * kVectors * kLanes];  // the gradients side by side; in their map a page apart
  alignas(64) float vectors[kWaiting * kFolded];
  for (int64_t b = 0; b < blocks; ++b) {
    const float* out = g.out + task.tile.row * out_row + task.tile.col * out_col + task.first * g.out_channel;
    float* copy = near;
    const int32_t* start = task.taps->starts + b * task.taps->outputs + task.first;
    float* to = task.partial + *start;
    int waiting = 0;
    Upcoming<kVectors> upcoming(task, b);
    for (int64_t o = task.first; o < last; ++o, ++start, out += g.out_channel, copy += kVectors * kLanes) {
      if (upcoming.wanted()) upcoming.Step();
      V d[kRows][kCols];
      if (b == 0) {
        LIPFAST_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const float* row = Row(out + r * out_row);
          LIPFAST_UNROLL
          for (int c = 0; c < kCols; ++c) d[r][c] = Load(row + c * out_col);
          LIPFAST_UNROLL
          for (int c = 0; c < kCols && next_ahead; ++c) Prefetch(row + g.out_channel + c * out_col);
        }
        LIPFAST_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          if (blocks > 1) Store(copy + i * kLanes, d[i / kCols][i % kCols]);
        }
        if (task.sums) {
          V total = Load(task.sums + o * kLanes);
          LIPFAST_UNROLL
          for (int i = 0; i < kVectors; ++i) total = Add(total, d[i / kCols][i % kCols]);
          Store(task.sums + o * kLanes, total);
        }
      } else {
        LIPFAST_UNROLL
        for (int i = 0; i < kVectors; ++i) d[i / kCols][i % kCols] = Load(copy + i * kLanes);
      }
      const auto dot = [&](int64_t offset, float* folded) __attribute__((always_inline)) {
        V sum[kChains];
        LIPFAST_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const float* row = Row(in + offset + r * in_row);
          LIPFAST_UNROLL
          for (int c = 0; c < kCols; ++c) {
            const int i = r * kCols + c;
            const V v = Load(row + c * in_col);
            sum[i % kChains] = i < kChains ? Mul(d[r][c], v) : Fma(d[r][c], v, sum[i % kChains]);
          }
        }
        StoreFolded(folded, kChains == 2 ? Add(sum[0], sum[kChains - 1]) : sum[0]);
      };
      const int32_t end = start[1];
      for (int32_t t = start[0]; t < end;) {
        const int32_t stop = static_cast<int32_t>(Least(end, t + kWaiting - waiting));
        float* folded = vectors + waiting * kFolded;
        waiting += stop - t;
        OffsetPair pair(offsets + t);  // see AddTaps
        for (; t + 2 <= stop; t += 2, folded += 2 * kFolded) {
          const int64_t a = pair.first(), b = pair.second();
          pair = OffsetPair(offsets + t + 2);
          dot(a, folded);
          dot(b, folded + kFolded);
        }
        if (t < stop) dot(offsets[t++], folded);
        if (waiting < kWaiting) continue;
        _Pragma("GCC unroll 1") for (waiting = 0; waiting < kWaiting; waiting += kLanes, to += kLanes) {
          StoreU(to, Add(LoadU(to), SumEach(vectors + waiting * kFolded)));
        }
        waiting = 0;
      }
    }
    for (int at = 0; at < waiting; at += kLanes) {
      AddSums(vectors + at * kFolded, static_cast<int>(Least(waiting - at, kLanes)), to + at);
    }
  }
}

using TileFunction = void (*)(const SparseTask&);

template <int kRows, int kCols, int kIn, int kOut>
struct Accumulate {
  static constexpr bool kFits = kRows * kCols <= kTileVectors;
  static void Run(const SparseTask& task) { AccumulateTile<kRows, kCols, kIn, kOut>(task); }
};
template <int kRows, int kCols, int kIn, int kOut>
struct Dot {
  static constexpr bool kFits = kRows * kCols <= kDotTileVectors;
  static void Run(const SparseTask& task) { DotTile<kRows, kCols, kIn, kOut>(task); }
};

template <class Kernel>
constexpr TileFunction IfItFits() {
  if constexpr (Kernel::kFits) {
    return Kernel::Run;
  } else {
    return nullptr;
  }
}

template <template <int, int, int, int> class Kernel, int kRows, int kIn, int kOut>
TileFunction WithCols(int64_t cols) {
  static constexpr TileFunction table[kTileCols] = {
      IfItFits<Kernel<kRows, 1, kIn, kOut>>(), IfItFits<Kernel<kRows, 2, kIn, kOut>>(),
      IfItFits<Kernel<kRows, 3, kIn, kOut>>(), IfItFits<Kernel<kRows, 4, kIn, kOut>>(),
      IfItFits<Kernel<kRows, 5, kIn, kOut>>(), IfItFits<Kernel<kRows, 6, kIn, kOut>>(),
      IfItFits<Kernel<kRows, 7, kIn, kOut>>(), IfItFits<Kernel<kRows, 8, kIn, kOut>>(),
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

// Regions are cut into pieces, which are counted through all of them; pieces(region) is how many one has.
template <class Pieces>
int64_t Total(const Region* regions, int64_t count, const Pieces& pieces) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += pieces(regions[i]);
  return total;
}

// The region of piece *i; *i becomes its number there.
template <class Pieces>
const Region* RegionOf(const Region* regions, int64_t* i, const Pieces& pieces) {
  for (int64_t n; *i >= (n = pieces(*regions)); ++regions) *i -= n;
  return regions;
}

struct TilesOf {
  TileSize most;
  int64_t operator()(const Region& g) const { return Tiling(g, most).count(); }
};

SparseTask TaskAt(const Region* regions, TileSize most, int64_t i) {
  SparseTask task = {};
  task.region = RegionOf(regions, &i, TilesOf{most});
  task.tile = TileAt(*task.region, Tiling(*task.region, most), i);
  return task;
}

constexpr int64_t kEnoughChunks = 16;

// Output channels are split where tiles are too few for all threads, and where they
// are more than a tile takes at once.
int64_t OutputParts(int64_t tiles, int64_t outputs) {
  return Most(Least(Parts(kEnoughChunks, tiles), Parts(outputs, 8)), Parts(outputs, kOutputsAtOnce));
}

// Maps that together exceed what a core finds in the last cache level, and those that other maps of a network
// displace there. The latter are worth it where an output has so few taps that moving maps is what takes the time.
constexpr int64_t kFarBytes = 32 << 20, kDisplacedBytes = 8 << 20;
constexpr int64_t kFewTaps = 60;

bool WorthFetchingAhead(const Region* regions, int64_t count, const TapList& taps) {
  if (kRegisters < 32 || !SecondLevelIsNear()) return false;
  const int64_t floats = taps.blocks * taps.block_stride + taps.outputs * regions->out_channel;
  const int64_t bytes = count * floats * static_cast<int64_t>(sizeof(float));
  const bool few = taps.starts[taps.outputs * taps.blocks] <= kFewTaps * taps.outputs;
  return bytes > (few ? kDisplacedBytes : kFarBytes);
}

// The i-th of all tiles, with what follows it before tile `stop`, for one part of the outputs.
SparseTask TaskAt(const Region* regions, const TapList& taps, TileSize most, int64_t i, int64_t stop, int64_t part,
                  int64_t parts) {
  SparseTask task = TaskAt(regions, most, i);
  task.taps = &taps;
  task.first = taps.outputs * part / parts;
  task.last = taps.outputs * (part + 1) / parts;
  if (i + 1 < stop) {
    const SparseTask next = TaskAt(regions, most, i + 1);
    const Region& g = *next.region;
    task.next_in = g.in + next.tile.row * g.in_row + next.tile.col * g.in_col;
    task.next_out = g.out + next.tile.row * g.out_row + next.tile.col * g.out_col;
    if (g.residual) task.next_residual = g.residual + next.tile.row * g.residual_row + next.tile.col * g.out_col;
  }
  return task;
}

ZeroHalo HaloOf(const Region& g, const TapEnd& end) {
  return {{end.grid, g.rows, end.height}, {end.grid, g.cols, end.width}, end.halo};
}

void SparseAccumulate(const Region* regions, int64_t count, const TapList& taps, const float* values, const float* bias,
                      const TapEnd& end, int threads) {
  const TileSize most = AccumulateSize(taps);
  const int64_t tiles = Total(regions, count, TilesOf{most});
  if (tiles == 0) return;
  const int64_t parts = OutputParts(tiles, taps.outputs);
  const ZeroHalo halo = HaloOf(*regions, end);
  const bool ahead = WorthFetchingAhead(regions, count, taps);
  ParallelFor(threads, tiles * parts, [&](int64_t chunk) {
    SparseTask task = TaskAt(regions, taps, most, chunk / parts, tiles, chunk % parts, parts);
    task.ahead = ahead;
    task.values = values;
    task.bias = bias;
    task.end = end.act;
    const Region& g = *task.region;
    const Tile& tile = task.tile;
    ForTile<Accumulate>(tile, g)(task);
    halo.Follow(g.out + task.first * g.out_channel, g.out_channel, task.last - task.first, g.out_row, tile.row,
                tile.col, tile.rows, tile.cols);
  });
}

void SparseOutputs(const Region& region, const TapList& taps, const float* values, const float* bias,
                   ActivationSpec act, int64_t first, int64_t last) {
  const Tiling tiling(region, AccumulateSize(taps));
  SparseTask task = {};
  task.region = &region;
  task.taps = &taps;
  task.values = values;
  task.bias = bias;
  task.end = act;
  for (task.first = first; task.first < last; task.first = task.last) {
    task.last = Least(task.first + kOutputsAtOnce, last);
    for (int64_t i = 0; i < tiling.count(); ++i) {
      task.tile = TileAt(region, tiling, i);
      ForTile<Accumulate>(task.tile, region)(task);
    }
  }
}

constexpr int64_t kPerTask = 4096;  // floats of a list

// The first of `chunks` arrays becomes the sum of all, in order.
void AddChunks(float* sums, int64_t chunks, int64_t size, int threads) {
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
  return Most(1, Least(Total(regions, count, TilesOf{DotSize(taps)}), kEnoughChunks));
}

void SparseDot(const Region* regions, int64_t count, const TapList& taps, float* partial, float* d_values,
               float* d_bias, int threads) {
  const TileSize most = DotSize(taps);
  const int64_t tiles = Total(regions, count, TilesOf{most}), chunks = DotChunks(regions, count, taps);
  const int64_t parts = OutputParts(chunks, taps.outputs), total = taps.starts[taps.outputs * taps.blocks];
  const int64_t size = DotFloats(total, taps.outputs), sums = size - kLanes * taps.outputs;
  const bool ahead = kRegisters < 32 || WorthFetchingAhead(regions, count, taps);
  std::memset(partial, 0, sizeof(float) * chunks * size);
  ParallelFor(threads, chunks * parts, [&](int64_t i) {
    const int64_t chunk = i / parts, part = i % parts;
    const int64_t stop = tiles * (chunk + 1) / chunks;
    for (int64_t tile = tiles * chunk / chunks; tile < stop; ++tile) {
      SparseTask task = TaskAt(regions, taps, most, tile, stop, part, parts);
      task.ahead = ahead;
      task.partial = partial + chunk * size;
      if (d_bias) task.sums = task.partial + sums;
      ForTile<Dot>(task.tile, *task.region)(task);
    }
  });
  AddChunks(partial, chunks, size, threads);
  ParallelFor(threads, Parts(total, kPerTask), [&](int64_t i) {
    const int64_t last = Least((i + 1) * kPerTask, total);
    for (int64_t t = i * kPerTask; t < last; ++t) d_values[taps.order[t]] = partial[t];
  });
  for (int64_t o = 0; d_bias && o < taps.outputs; ++o) d_bias[o] = Sum(Load(partial + sums + o * kLanes));
}

// --- dense ---------------------------------------------------------------------

constexpr int kGroup = kRegisters >= 8 ? 6 : 4;          // output channels that share a load of the input
constexpr int kDenseVectors = kRegisters >= 32 ? 4 : 1;  // kGroup * kDenseVectors sums in registers

// Taps between two visits of a sum to memory, whose input takes most of the first cache level or a part of the second.
constexpr int64_t kMostDenseTaps = 1152;
int64_t DenseBlock(int64_t taps) {
  const bool far = kRegisters < 32 || Avx512InHalves();
  const int64_t most = far ? kMostDenseTaps : SecondLevelIsNear() ? 128 : 96;
  return Most(1, Parts(taps, Most(1, Parts(taps, most))));  // equal ones
}

constexpr int64_t kFetchedTaps = kRegisters >= 32 ? 16 : 32;  // how far ahead of its copying input is fetched

constexpr int kDotGroup = 4;                        // output channels that share a load in the weight gradient
constexpr int kDotTaps = kRegisters >= 32 ? 6 : 3;  // kDotGroup * kDotTaps sums in registers

// Positions whose input, for some taps, stays in the first cache level, or in the second. Sums are taken across lanes
// once for so many.
int64_t DotVectors() { return kRegisters >= 32 && Avx512InHalves() ? 256 : 64; }

struct DenseTask {
  const Region* region;
  const DenseTaps* taps;
  const float* weights;
  const float* bias;
  ActivationSpec end;
  int64_t block;        // of taps
  bool ahead;           // fetch the input of the tile that follows
  int64_t at;           // the tile's first position of the region, which are counted row by row
  int64_t first, last;  // groups of output channels
};

// Where the vectors of a tile lie, and those that follow them.
template <int kVectors>
struct DensePlaces {
  const float *in[kVectors], *next_in[kVectors];
  int64_t out[kVectors], next_out[kVectors], residual[kVectors];

  DensePlaces(const Region& g, int64_t at) {
    int64_t row = at / g.cols, col = at % g.cols;
    for (int i = 0; i < 2 * kVectors; ++i) {
      (i < kVectors ? out[i] : next_out[i - kVectors]) = row * g.out_row + col * g.out_col;
      (i < kVectors ? in[i] : next_in[i - kVectors]) = g.in + row * g.in_row + col * g.in_col;
      if (i < kVectors) {
        residual[i] = row * g.residual_row + col * g.out_col;
      }
      if (++col == g.cols) {
        col = 0;
        ++row;
      }
    }
  }
};

// Groups whose sums wait side by side from one block of taps to the next; in their map they would lie a page apart.
constexpr int64_t kGroupsAtOnce = 22;

// Taps [begin, end) of one group of outputs, of which kOutputs are computed, at kVectors positions; `packed` is
// their input side by side, for kCopies yet to be copied there, `waiting` where their sums wait between blocks.
template <int kVectors, int kOutputs, bool kCopies>
void DenseGroup(const DenseTask& task, const DensePlaces<kVectors>& at, float* packed, int64_t begin, int64_t end,
                int64_t group, float* waiting) {
  const Region& g = *task.region;
  const int64_t count = task.taps->taps, outputs = task.taps->outputs;
  float* out = g.out + group * kGroup * g.out_channel;
  const int live = static_cast<int>(Least(kOutputs, outputs - group * kGroup));
  V sum[kOutputs][kVectors];
  LIPFAST_UNROLL
  for (int k = 0; k < kOutputs; ++k) {
    LIPFAST_UNROLL
    for (int i = 0; i < kVectors; ++i) sum[k][i] = Zero();
  }
  if (begin > 0 || task.bias) {
    LIPFAST_UNROLL
    for (int k = 0; k < kOutputs; ++k) {
      if (k >= live) continue;
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        sum[k][i] = begin ? Load(waiting + (k * kVectors + i) * kLanes) : Set(task.bias[group * kGroup + k]);
      }
    }
  }
  // What the next tile reads and writes comes from far away.
  if (task.ahead) {
    const int64_t groups = task.last - task.first, done = group - task.first, last = count * (done + 1) / groups;
    _Pragma("GCC unroll 1") for (int64_t t = count * done / groups; t < last; ++t) {
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) PrefetchFar(at.next_in[i] + task.taps->offsets[t]);
    }
  }
  for (int k = 0; k < live && end == count; ++k) {
    LIPFAST_UNROLL
    for (int i = 0; i < kVectors; ++i) PrefetchFar(out + k * g.out_channel + at.next_out[i]);
  }
  const float* w = task.weights + (group * count + begin) * kGroup;
  float* x = packed;
  _Pragma("GCC unroll 4") for (int64_t t = begin; t < end; ++t, w += kGroup, x += kVectors * kLanes) {
    V v[kVectors];
    if (kCopies) {
      const int32_t soon = task.taps->offsets[Least(t + kFetchedTaps, end - 1)];
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) Prefetch(at.in[i] + soon);
    }
    LIPFAST_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      v[i] = Load(kCopies ? at.in[i] + task.taps->offsets[t] : x + i * kLanes);
      if (kCopies) Store(x + i * kLanes, v[i]);
    }
    LIPFAST_UNROLL
    for (int k = 0; k < kOutputs; ++k) {
      const V weight = Set(w[k]);
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) sum[k][i] = Fma(weight, v[i], sum[k][i]);
    }
  }
  if (end < count) {
    LIPFAST_UNROLL
    for (int k = 0; k < kOutputs; ++k) {
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) Store(waiting + (k * kVectors + i) * kLanes, sum[k][i]);
    }
    return;
  }
  LIPFAST_UNROLL
  for (int k = 0; k < kOutputs; ++k) {
    if (k >= live) continue;
    if (g.residual) {
      const float* add = Row(g.residual + (group * kGroup + k) * g.residual_channel);
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) sum[k][i] = Add(sum[k][i], Load(add + at.residual[i]));
    }
    float* to = Row(out + k * g.out_channel);
    const ActivationSpec& act = *Row(&task.end);  // its constants would stay in registers that the sums need
    LIPFAST_UNROLL
    for (int i = 0; i < kVectors; ++i) Store(to + at.out[i], SimpleAct(sum[k][i], act));
  }
}

// The kernel of a group with `live` outputs left; the others would be computed for nothing.
template <int kVectors, bool kCopies>
auto DenseGroupFor(int64_t live) {
  return live <= 2   ? DenseGroup<kVectors, 2, kCopies>
         : live <= 4 ? DenseGroup<kVectors, 4, kCopies>
                     : DenseGroup<kVectors, kGroup, kCopies>;
}

// A thread's room for the input of a tile and block of taps; a stack may be too small for it.
float* PackedInput() {
  struct alignas(64) Vector {
    float lanes[kLanes];
  };
  static thread_local const std::unique_ptr<Vector[]> vectors(new Vector[kMostDenseTaps * kDenseVectors]);
  return vectors[0].lanes;
}

// kVectors positions, of one row or several. The first group of outputs copies the input of a block of taps side by
// side, while it waits for it: in its map it lies in more pages than a core finds at once, and all groups read it.
template <int kVectors>
void DenseTile(const DenseTask& task) {
  const int64_t count = task.taps->taps, outputs = task.taps->outputs;
  float* packed = PackedInput();
  alignas(64) float waiting[kGroupsAtOnce * kGroup * kVectors * kLanes];
  const DensePlaces<kVectors> at(*task.region, task.at);
  for (int64_t begin = 0; begin == 0 || begin < count; begin += task.block) {
    const int64_t end = Least(begin + task.block, count);
    for (int64_t group = task.first; group < task.last; ++group) {
      const int64_t live = outputs - group * kGroup;
      const auto run = group == task.first ? DenseGroupFor<kVectors, true>(live) : DenseGroupFor<kVectors, false>(live);
      const int64_t waits = count > task.block ? group - task.first : 0;
      run(task, at, packed, begin, end, group, waiting + waits * kGroup * kVectors * kLanes);
    }
  }
}

// The tile of `vectors` <= kVectors.
template <int kVectors>
void RunDenseTile(const DenseTask& task, int64_t vectors) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return RunDenseTile<kVectors - 1>(task, vectors);
  }
  DenseTile<kVectors>(task);
}

// Rows of a region that are cut into tiles together: several where they are short.
int64_t StripRows(const Region& g) { return Parts(2 * kDenseVectors, g.cols); }
int64_t StripsOf(const Region& g) { return Parts(g.rows, StripRows(g)); }
int64_t RowsOf(const Region& g) { return g.rows; }
int64_t PositionsOf(const Region& g) { return g.rows * g.cols; }

// Layers that read little for each output wait for maps beyond the last cache level; the maps of those with few taps
// are as large as if they were 1x1.
constexpr int64_t kFewDenseTaps = 128;

bool WorthFetchingAhead(const Region* regions, int64_t count, const DenseTaps& taps) {
  if (kRegisters < 32 || !SecondLevelIsNear() || taps.taps > kFewDenseTaps) return false;
  const int64_t vectors = Total(regions, count, PositionsOf) * (taps.taps + taps.outputs);
  return vectors * kLanes * static_cast<int64_t>(sizeof(float)) > kFarBytes;
}

// Strip `i` of the task's region: its first row and rows.
std::pair<int64_t, int64_t> RunStrip(DenseTask task, int64_t i) {
  const Region& g = *task.region;
  const int64_t row = i * StripRows(g), rows = Least(StripRows(g), g.rows - row);
  const int64_t positions = rows * g.cols, tiles = Parts(positions, kDenseVectors);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    task.at = row * g.cols + positions * tile / tiles;
    RunDenseTile<kDenseVectors>(task, positions * (tile + 1) / tiles - positions * tile / tiles);
  }
  return {row, rows};
}

void DenseAccumulate(const Region* regions, int64_t count, const DenseTaps& taps, const float* weights,
                     const float* bias, const TapEnd& end, int threads) {
  const int64_t strips = Total(regions, count, StripsOf);
  if (strips == 0) return;
  const int64_t block = DenseBlock(taps.taps), groups = Parts(taps.outputs, kGroup);
  const int64_t at_once = taps.taps > block ? kGroupsAtOnce : groups;
  const int64_t parts = Most(Least(Parts(kEnoughChunks, strips), groups), Parts(groups, at_once));
  const ZeroHalo halo = HaloOf(*regions, end);
  const bool ahead = WorthFetchingAhead(regions, count, taps);
  ParallelFor(threads, strips * parts, [&](int64_t chunk) {
    int64_t strip = chunk / parts;
    const Region& g = *RegionOf(regions, &strip, StripsOf);
    DenseTask task = {&g, &taps, weights, bias, end.act, block, ahead, 0, 0, 0};
    task.first = groups * (chunk % parts) / parts;
    task.last = groups * (chunk % parts + 1) / parts;
    const auto [row, rows] = RunStrip(task, strip);
    const int64_t first = task.first * kGroup, last = Least(task.last * kGroup, taps.outputs);
    halo.Follow(g.out + first * g.out_channel, g.out_channel, last - first, g.out_row, row, 0, rows, g.cols);
  });
}

void DenseOutputs(const Region& region, const DenseTaps& taps, const float* weights, const float* bias,
                  ActivationSpec act, int64_t first, int64_t last) {
  const int64_t block = DenseBlock(taps.taps), end = Parts(last, kGroup);
  DenseTask task = {&region, &taps, weights, bias, act, block, false, 0, first / kGroup, 0};
  for (; task.first < end; task.first = task.last) {
    task.last = Least(task.first + kGroupsAtOnce, end);
    for (int64_t strip = 0; strip < StripsOf(region); ++strip) RunStrip(task, strip);
  }
}

// kDotGroup output channels times kTaps taps over rows [row, last) of a region.
template <int kTaps>
void DenseDotRows(const Region& g, int64_t row, int64_t last, const int32_t* offsets, int64_t group, int live,
                  float* sums, int64_t sums_stride) {
  R sum[kDotGroup][kTaps];  // a vector that takes several registers adds all of them to one
  LIPFAST_UNROLL
  for (int k = 0; k < kDotGroup; ++k) {
    LIPFAST_UNROLL
    for (int t = 0; t < kTaps; ++t) sum[k][t] = SetR(0.0f);
  }
  for (; row < last; ++row) {
    const float* dy[kDotGroup];
    LIPFAST_UNROLL
    for (int k = 0; k < kDotGroup; ++k) {
      dy[k] = g.out + (group * kDotGroup + (k < live ? k : 0)) * g.out_channel + row * g.out_row;
    }
    const float* x[kTaps];
    LIPFAST_UNROLL
    for (int t = 0; t < kTaps; ++t) x[t] = g.in + row * g.in_row + offsets[t];
    int64_t at_out = 0, at_in = 0;
    for (int64_t col = 0; col < g.cols; ++col, at_out += g.out_col, at_in += g.in_col) {
      LIPFAST_UNROLL
      for (int lane = 0; lane < kLanes; lane += kRegisterLanes) {
        R v[kTaps];
        LIPFAST_UNROLL
        for (int t = 0; t < kTaps; ++t) v[t] = LoadR(x[t] + at_in + lane);
        LIPFAST_UNROLL
        for (int k = 0; k < kDotGroup; ++k) {
          const R d = LoadR(dy[k] + at_out + lane);
          LIPFAST_UNROLL
          for (int t = 0; t < kTaps; ++t) sum[k][t] = Fma(d, v[t], sum[k][t]);
        }
      }
    }
  }
  LIPFAST_UNROLL
  for (int k = 0; k < kDotGroup; ++k) {
    if (k >= live) continue;
    LIPFAST_UNROLL
    for (int t = 0; t < kTaps; ++t) sums[k * sums_stride + t] += Sum(sum[k][t]);
  }
}

// total + what rows [row, last_row) of an output hold, line by line: the rounding error grows with rows +
// columns, not with pixels.
V AddLines(const Region& g, int64_t row, int64_t last_row, int64_t output, V total) {
  for (; row < last_row; ++row) {
    const float* p = g.out + output * g.out_channel + row * g.out_row;
    V line = Zero();
    for (int64_t col = 0; col < g.cols; ++col) line = Add(line, Load(p + col * g.out_col));
    total = Add(total, line);
  }
  return total;
}

// Groups [first, last) over rows [row, last_row) of a region. The input of some taps stays in the first
// cache level while the gradients of all groups, which are fewer bytes for each product, pass by.
template <int kTaps>
void DenseDotTaps(const Region& g, int64_t row, int64_t last_row, const DenseTaps& taps, int64_t t, int64_t first,
                  int64_t last, float* partial) {
  for (int64_t group = first; group < last; ++group) {
    const int live = static_cast<int>(Least(kDotGroup, taps.outputs - group * kDotGroup));
    float* out = partial + group * kDotGroup * taps.taps;
    DenseDotRows<kTaps>(g, row, last_row, taps.offsets + t, group, live, out + t, taps.taps);
  }
}

// Few enough that taking the sums across lanes, once a chunk and weight, costs little.
int64_t DenseDotChunks(const Region* regions, int64_t count) {
  const int64_t positions = Total(regions, count, PositionsOf);
  return Most(1, Least(Least(Total(regions, count, RowsOf), positions / DotVectors()), 8));
}

void DenseDot(const Region* regions, int64_t count, const DenseTaps& taps, float* partial, float* d_bias, int threads) {
  const int64_t rows = Total(regions, count, RowsOf), chunks = DenseDotChunks(regions, count);
  const int64_t groups = Parts(taps.outputs, kDotGroup), parts = OutputParts(chunks, taps.outputs);
  const int64_t size = DotFloats(taps.outputs * taps.taps, taps.outputs), sums = size - kLanes * taps.outputs;
  ParallelFor(threads, chunks * parts, [&](int64_t i) {
    const int64_t chunk = i / parts, part = i % parts;
    const int64_t first = groups * part / parts, last = groups * (part + 1) / parts;
    float* sum = partial + chunk * size;
    const int64_t begin = first * kDotGroup, end = Least(last * kDotGroup, taps.outputs);
    std::memset(sum + begin * taps.taps, 0, sizeof(float) * (end - begin) * taps.taps);
    std::memset(sum + sums + begin * kLanes, 0, sizeof(float) * (end - begin) * kLanes);
    const int64_t line_end = rows * (chunk + 1) / chunks;
    for (int64_t line = rows * chunk / chunks; line < line_end;) {
      int64_t row = line;
      const Region* region = RegionOf(regions, &row, RowsOf);
      const int64_t count = Least(Least(Parts(DotVectors(), region->cols), region->rows - row), line_end - line);
      int64_t t = 0;
      for (; t + kDotTaps <= taps.taps; t += kDotTaps) {
        DenseDotTaps<kDotTaps>(*region, row, row + count, taps, t, first, last, sum);
      }
      for (; t < taps.taps; ++t) DenseDotTaps<1>(*region, row, row + count, taps, t, first, last, sum);
      for (int64_t o = begin; d_bias && o < end; ++o) {
        float* to = sum + sums + o * kLanes;
        Store(to, AddLines(*region, row, row + count, o, Load(to)));
      }
      line += count;
    }
  });
  AddChunks(partial, chunks, size, threads);
  for (int64_t o = 0; d_bias && o < taps.outputs; ++o) d_bias[o] = Sum(Load(partial + sums + o * kLanes));
}

void ChannelSums(const Region* regions, int64_t count, int64_t channels, float* sums, int threads) {
  ParallelFor(threads, channels, [&](int64_t channel) {
    V total = Zero();
    for (int64_t i = 0; i < count; ++i) total = AddLines(regions[i], 0, regions[i].rows, channel, total);
    sums[channel] = Sum(total);
  });
}

}  // namespace

extern const TapKernels tap_kernels;
const TapKernels tap_kernels = {SparseAccumulate,
                                SparseOutputs,
                                SparseDot,
                                DotChunks,
                                DenseAccumulate,
                                DenseOutputs,
                                DenseDot,
                                DenseDotChunks,
                                ChannelSums,
                                kTileVectors,
                                Least(kTileVectors, kTileCols),
                                kGroup};

}  // namespace LIPFAST_NS
}  // namespace lipfast
