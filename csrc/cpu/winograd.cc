#include "cpu/winograd.h"

#include <vector>

#include "cpu/activation.h"
#include "cpu/halo.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"
#include "cpu/winograd_forms.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// ---- sizes -----------------------------------------------------------------

// The register block of the matrix products: kRows scalars times kCols vectors.
constexpr int kCols = kRegisters >= 32 ? 4 : 1;
constexpr int kRows = kRegisters >= 8 ? 6 : 3;
static_assert(kWinogradRows % kRows == 0 && kWinogradNumbers == kLanes, "the weights' step holds whole blocks");
constexpr int64_t kSkew = 5 * kLanes;  // floats between frequencies, so that they fall into different cache sets
// Output channels multiplied before their inverse transform.
constexpr int64_t kOutChannels = (kRegisters >= 32 ? 11 : 22) * kRows;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
int64_t CommonDivisor(int64_t a, int64_t b) { return b ? CommonDivisor(b, a % b) : a; }

// Calls body(slot, item) for every item; slot < threads names scratch memory that no other thread is using. A thread
// begins with the same items in every call with as many of them, so that what it wrote is near when it reads it.
template <class Body>
void ForEachItem(int threads, int64_t items, const Body& body) {
  const int64_t slots = AtMost(threads, items);
  std::vector<int64_t> next(slots);
  for (int64_t slot = 0; slot < slots; ++slot) next[slot] = items * slot / slots;
  ParallelFor(threads, slots, [&](int64_t slot) {
    for (int64_t i = 0; i < slots; ++i) {
      const int64_t owner = (slot + i) % slots, end = items * (owner + 1) / slots;
      for (int64_t item; (item = __atomic_fetch_add(&next[owner], 1, __ATOMIC_RELAXED)) < end;) body(slot, item);
    }
  });
}

// Inner products of `all` are cut into parts of this many: their kCols vectors stay in L1, with room for what else
// passes by.
int64_t Depth(int64_t all) {
  const int64_t level = SecondLevelIsNear() ? 48 << 10 : 32 << 10;
  const int64_t most = AtMost(160, level * 3 / 4 / (kCols * kLanes * sizeof(float)));
  return RoundUp(CeilDiv(all, CeilDiv(all, most)), kLanes);
}

// Left matrices lie as the products read them: kRows rows at a time, kLanes of their numbers each. The place of
// number k of a row; k and the rows' length are multiples of kLanes.
int64_t LeftAt(int64_t row, int64_t k, int64_t length) {
  return row / kRows * kRows * length + k * kRows + row % kRows * kLanes;
}

// ---- tiles -------------------------------------------------------------------

// The tiles of a map in the order of images, rows, columns. With a stride, of the smaller map.
struct TileGrid {
  int64_t rows, cols, count;

  TileGrid(const LaneMap& m, int tile)
      : rows(CeilDiv(m.block_h, tile)), cols(CeilDiv(m.block_w, tile)), count(m.batch * rows * cols) {}
};

struct TilePosition {
  int64_t image, row, col;  // first pixel in each block
  int64_t live_rows, live_cols;
};

TilePosition TileAt(const LaneMap& m, const TileGrid& grid, int tile, int64_t index) {
  TilePosition p;
  p.col = index % grid.cols * tile;
  p.row = index / grid.cols % grid.rows * tile;
  p.image = index / grid.cols / grid.rows;
  p.live_rows = AtMost(tile, m.block_h - p.row);
  p.live_cols = AtMost(tile, m.block_w - p.col);
  return p;
}

// The kSize x kSize vectors of channel c from `border` rows and columns before the tile on,
// whose pixels are `step` apart in this map. A patch that a block's edge cuts is copied to
// `copy`, with zeros outside, so nothing that the tile's own pixels do not need is read.
// The next channel's patch is fetched, all but the columns that tiles share: planes lie
// pages apart, where the hardware does not fetch ahead.
template <int kSize>
Patch PatchAt(const LaneMap& m, const TilePosition& p, int64_t c, int border, int step, int tile, float* copy) {
  const float* data = m.At(p.image, c, step * p.row - border, step * p.col - border);
  for (int r = 0; r < kSize; ++r) {
    for (int s = border; s < kSize - border; ++s) Prefetch(data + m.channel_stride + r * m.row_stride + s * kLanes);
  }
  if (p.live_rows == tile && p.live_cols == tile) return {data, m.row_stride};
  const int64_t rows = kSize - step * (tile - p.live_rows), cols = kSize - step * (tile - p.live_cols);
  for (int r = 0; r < kSize; ++r) {
    for (int s = 0; s < kSize; ++s) {
      Store(copy + (r * kSize + s) * kLanes,
            r < rows && s < cols ? Load(data + r * m.row_stride + s * kLanes) : Zero());
    }
  }
  return {copy, kSize * kLanes};
}

// ---- matrix product ------------------------------------------------------------

// Into L2 only: there is no room to spare in L1.
inline void PrefetchL2(const float* p) { __builtin_prefetch(p, 0, 2); }

// c[r][..] (+)= sum over k < depth of a[r][k] b[k][..] for kR rows and kC vectors. a as LeftAt says; b is packed,
// [depth][kC]. `rows_ahead` is where the next call's a begins, `panel_ahead` a part of the next b.
template <int kR, int kC>
void Multiply(const float* a, const float* b, float* c, int64_t c_stride, int64_t depth, bool add,
              const float* rows_ahead, const float* panel_ahead) {
  V sum[kR][kC];
  LIPFAST_UNROLL
  for (int r = 0; r < kR; ++r) {
    LIPFAST_UNROLL
    for (int s = 0; s < kC; ++s) sum[r][s] = add ? Load(c + r * c_stride + s * kLanes) : Zero();
  }
  for (int64_t k = 0; k < depth; k += kLanes, a += kRows * kLanes) {
    LIPFAST_UNROLL
    for (int r = 0; r < kR; ++r) PrefetchL2(rows_ahead + k * kRows + r * kLanes);
    if (kRegisters >= 32) {
      LIPFAST_UNROLL
      for (int r = 0; r < kRows; ++r) PrefetchL2(panel_ahead + k * kRows + r * kLanes);
    }
    const int64_t steps = AtMost(kLanes, depth - k);
    _Pragma("GCC unroll 4") for (int64_t i = 0; i < steps; ++i, b += kC * kLanes) {
      V v[kC];
      LIPFAST_UNROLL
      for (int s = 0; s < kC; ++s) v[s] = Load(b + s * kLanes);
      LIPFAST_UNROLL
      for (int r = 0; r < kR; ++r) {
        const V w = Set(a[r * kLanes + i]);
        LIPFAST_UNROLL
        for (int s = 0; s < kC; ++s) sum[r][s] = Fma(w, v[s], sum[r][s]);
      }
    }
  }
  LIPFAST_UNROLL
  for (int r = 0; r < kR; ++r) {
    LIPFAST_UNROLL
    for (int s = 0; s < kC; ++s) Store(c + r * c_stride + s * kLanes, sum[r][s]);
  }
}

using MultiplyFunction = void (*)(const float*, const float*, float*, int64_t, int64_t, bool, const float*,
                                  const float*);

// The register block of `rows` <= kR and `cols` <= kC.
template <int kR, int kC>
MultiplyFunction MultiplyFor(int rows, int cols) {
  if constexpr (kR > 1) {
    if (rows < kR) return MultiplyFor<kR - 1, kC>(rows, cols);
  }
  if constexpr (kC > 1) {
    if (cols < kC) return MultiplyFor<kR, kC - 1>(rows, cols);
  }
  return Multiply<kR, kC>;
}

// c [rows][c_stride] (+)= a [rows][a_length] times b [depth][cols], cols <= kCols. `next` is the b that
// follows, fetched meanwhile; where the sums come from far away, that would hold them up, and it is b itself.
void MultiplyPanel(const float* a, int64_t a_length, int64_t rows, const float* b, int cols, float* c, int64_t c_stride,
                   int64_t depth, bool add, const float* next) {
  for (int64_t r = 0; r < rows; r += kRows) {
    const MultiplyFunction multiply = MultiplyFor<kRows, kCols>(static_cast<int>(AtMost(kRows, rows - r)), cols);
    const float* ahead = r + kRows < rows ? a + kRows * a_length : a;
    multiply(a, b, c + r * c_stride, c_stride, depth, add, ahead, next + r * depth);
    a += kRows * a_length;
  }
}

// ---- weights ---------------------------------------------------------------------

template <class Form>
void TransformWeights(const float* w, int64_t out, int64_t in, bool transposed, float* u, int threads) {
  constexpr int kSize = Form::kSize, kTaps = Form::kTaps, kPlaces = kTaps * kTaps;
  // Rows and columns of the matrices U; the vector runs along a row.
  const int64_t rows = transposed ? in : out, cols = transposed ? out : in;
  const int64_t step = WinogradWeightStep(out, in), length = RoundUp(cols, kLanes);
  const int64_t row_step = transposed ? kPlaces : kPlaces * in, col_step = transposed ? kPlaces * in : kPlaces;
  ParallelFor(threads, rows, [&](int64_t row) {
    for (int64_t col = 0; col < cols; col += kLanes) {
      const int n = static_cast<int>(AtMost(kLanes, cols - col));
      alignas(64) float taps[kPlaces][kLanes] = {};
      for (int i = 0; i < n; ++i) {
        const float* filter = w + row * row_step + (col + i) * col_step;
        for (int t = 0; t < kPlaces; ++t) taps[transposed ? kPlaces - 1 - t : t][i] = filter[t];
      }
      V half[kSize][kTaps];  // G w
      for (int s = 0; s < kTaps; ++s) {
        V column[kTaps], line[kSize];
        for (int r = 0; r < kTaps; ++r) column[r] = Load(taps[r * kTaps + s]);
        Form::Weight(column, line);
        for (int r = 0; r < kSize; ++r) half[r][s] = line[r];
      }
      for (int r = 0; r < kSize; ++r) {
        V line[kSize];
        Form::Weight(half[r], line);
        for (int s = 0; s < kSize; ++s) Store(u + (r * kSize + s) * step + LeftAt(row, col, length), line[s]);
      }
    }
  });
}

// ---- forward -----------------------------------------------------------------------

// Values of the frequencies before f in one tile; of all frequencies for f = kFrequencies.
template <class Form>
constexpr int ValuesBefore(int f) {
  int values = 0;
  for (int i = 0; i < f; ++i) values += Form::Instances(i);
  return values;
}

template <class Form>
class Forward {
  static constexpr int kTile = Form::kTile, kFrequencies = Form::kFrequencies;
  static constexpr int kMostTiles = Form::kTiles > Form::kFewTiles ? Form::kTiles : Form::kFewTiles;

 public:
  Forward(const LaneMap& x, const LaneMap& y, const ConvEnd& end, int threads)
      : x_(x),
        y_(y),
        small_(Form::kOutStep == 1 ? y : x),
        grid_(small_, kTile),
        end_(end),
        halo_(y.rows(), y.columns(), end.halo.fill ? y.halo : 0),
        threads_(threads) {
    // Few tiles: threads share the transformed input and divide the output channels.
    shared_ = grid_.count < 2 * threads * Form::kTiles;
    tiles_ = shared_ ? Form::kFewTiles : Form::kTiles;
    blocks_ = CeilDiv(grid_.count, tiles_);
    const int64_t most_out = AtMost(y.channels, kOutChannels);
    for (int f = 0; f <= kFrequencies; ++f) {
      const int64_t vectors = tiles_ * ValuesBefore<Form>(f);
      v_start_[f] = vectors * (x.channels + 1) * kLanes + f * kSkew;
      m_start_[f] = vectors * most_out * kLanes + f * kSkew;
    }
  }

  int64_t ScratchFloats() const { return VFloats() * (shared_ ? blocks_ : threads_) + MFloats() * threads_; }

  void Run(const float* u, const float* bias, float* scratch) const {
    float* v = scratch;
    float* m = scratch + VFloats() * (shared_ ? blocks_ : threads_);
    if (shared_) {
      RunShared(u, bias, v, m);
      return;
    }
    ForEachItem(threads_, blocks_, [&](int64_t slot, int64_t block) {
      float* block_v = v + slot * VFloats();
      TransformInput(block, 0, x_.channels, block_v);
      for (int64_t out = 0; out < y_.channels; out += kOutChannels) {
        OutputChannels(block, out, AtMost(kOutChannels, y_.channels - out), u, bias, block_v, m + slot * MFloats());
      }
    });
  }

 private:
  int64_t VFloats() const { return v_start_[kFrequencies]; }
  int64_t MFloats() const { return m_start_[kFrequencies]; }

  void RunShared(const float* u, const float* bias, float* v, float* m) const {
    constexpr int64_t kInPart = 16;
    const int64_t in_parts = CeilDiv(x_.channels, kInPart);
    // Few large parts, for each reads all of v; as many for one thread as for another.
    const int64_t fair_parts = threads_ / CommonDivisor(blocks_, threads_);
    const int64_t out_part = AtMost(RoundUp(CeilDiv(y_.channels, fair_parts), kRows), kOutChannels);
    const int64_t out_parts = CeilDiv(y_.channels, out_part);
    ForEachItem(threads_, blocks_ * in_parts, [&](int64_t, int64_t item) {
      const int64_t block = item / in_parts, from = item % in_parts * kInPart;
      TransformInput(block, from, AtMost(from + kInPart, x_.channels), v + block * VFloats());
    });
    ForEachItem(threads_, blocks_ * out_parts, [&](int64_t slot, int64_t item) {
      const int64_t block = item / out_parts, from = item % out_parts * out_part;
      OutputChannels(block, from, AtMost(out_part, y_.channels - from), u, bias, v + block * VFloats(),
                     m + slot * MFloats());
    });
  }

  int64_t TilesIn(int64_t block) const { return AtMost(tiles_, grid_.count - block * tiles_); }

  void Positions(int64_t block, TilePosition (&at)[kMostTiles]) const {
    for (int64_t t = 0; t < TilesIn(block); ++t) at[t] = TileAt(small_, grid_, kTile, block * tiles_ + t);
  }

  // v [frequency][panel of columns][channel][column of the panel]; a column is one value of one tile. Panels lie
  // a channel more apart than there are, which spreads them over the cache's sets.
  void TransformInput(int64_t block, int64_t first, int64_t last, float* v) const {
    const int64_t tiles = TilesIn(block);
    TilePosition at[kMostTiles];
    Positions(block, at);
    alignas(64) float copy[Form::kPatch * Form::kPatch * kLanes];
    for (int64_t c = first; c < last; ++c) {
      for (int64_t t = 0; t < tiles; ++t) {
        const Patch patch = PatchAt<Form::kPatch>(x_, at[t], c, Form::kBorder, Form::kInStep, kTile, copy);
        InputGroup<0>(patch, c, t, tiles, v);
        InputGroup<1>(patch, c, t, tiles, v);
        if constexpr (Form::kGroups > 2) InputGroup<2>(patch, c, t, tiles, v);
        if constexpr (Form::kGroups > 3) InputGroup<3>(patch, c, t, tiles, v);
      }
    }
  }

  template <int kGroup>
  void InputGroup(const Patch& patch, int64_t c, int64_t t, int64_t tiles, float* v) const {
    for (int lane = 0; lane < kLanes; lane += kRegisterLanes) {
      Form::template Input<kGroup>(patch, lane, [&](int f, int instance, R value) {
        Store(v + v_start_[f] + ColumnAt(Form::Instances(f), t, instance, tiles, c) + lane, value);
      });
    }
  }

  // Where a value lies among those of its frequency.
  int64_t ColumnAt(int instances, int64_t t, int instance, int64_t tiles, int64_t c) const {
    const int64_t col = t * instances + instance, panel = col / kCols * kCols;
    const int64_t width = instances % kCols ? AtMost(kCols, tiles * instances - panel) : kCols;
    return (panel * (x_.channels + 1) + c * width + col - panel) * kLanes;
  }

  // Output channels first .. first + count - 1 of a block; m [frequency][channel][column].
  void OutputChannels(int64_t block, int64_t first, int64_t count, const float* u, const float* bias, const float* v,
                      float* m) const {
    const int64_t tiles = TilesIn(block), in = x_.channels, length = RoundUp(in, kLanes), depth = Depth(in);
    for (int f = 0; f < kFrequencies; ++f) {
      const float* rows = u + f * WinogradWeightStep(y_.channels, in) + LeftAt(first, 0, length);
      const int64_t columns = tiles * Form::Instances(f), m_stride = tiles_ * Form::Instances(f) * kLanes;
      const auto width = [&](int64_t t) { return AtMost(kCols, columns - t); };
      const auto panel = [&](int64_t t, int64_t k) { return v + v_start_[f] + (t * (in + 1) + k * width(t)) * kLanes; };
      for (int64_t k = 0; k < in; k += depth) {
        for (int64_t t = 0; t < columns; t += kCols) {
          const float* next = t + kCols < columns ? panel(t + kCols, k)
                              : k + depth < in    ? panel(0, k + depth)
                                                  : v + v_start_[f + 1];
          MultiplyPanel(rows + k * kRows, length, count, panel(t, k), static_cast<int>(width(t)),
                        m + m_start_[f] + t * kLanes, m_stride, AtMost(depth, in - k), k > 0, next);
        }
      }
    }
    TilePosition at[kMostTiles];
    Positions(block, at);
    for (int64_t c = 0; c < count; ++c) {
      const V scale = Set(end_.scale ? end_.scale[first + c] : 1.0f), offset = Set(bias ? bias[first + c] : 0.0f);
      for (int64_t t = 0; t < tiles; ++t) StoreTile(m, c, t, scale, offset, at[t], first + c);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      halo_.Follow(y_.At(at[t].image, first), y_.channel_stride, count, y_.row_stride, at[t].row, at[t].col,
                   at[t].live_rows, at[t].live_cols);
    }
  }

  void StoreTile(const float* m, int64_t c, int64_t t, V scale, V offset, const TilePosition& at,
                 int64_t channel) const {
    constexpr int kStep = Form::kOutStep;
    float* to = y_.At(at.image, channel, kStep * at.row, kStep * at.col);
    const float* add = end_.residual ? end_.residual->At(at.image, channel, at.row, at.col) : nullptr;
    const bool whole = at.live_rows == kTile && at.live_cols == kTile;
    const auto get = [&](int f, int instance) {
      const int64_t column = (c * tiles_ + t) * Form::Instances(f) + instance;
      return Load(m + m_start_[f] + column * kLanes);
    };
    Form::Output(get, [&](int r, int s, V sum) {
      if (!whole && (r >= kStep * at.live_rows || s >= kStep * at.live_cols)) return;
      V result = Fma(scale, sum, offset);
      if (add) result = Add(result, Load(add + r * end_.residual->row_stride + s * kLanes));
      Store(to + r * y_.row_stride + s * kLanes, SimpleAct(result, end_.act));
    });
  }

  LaneMap x_, y_, small_;  // small_: the one of them that is cut into tiles
  TileGrid grid_;
  ConvEnd end_;
  ZeroHalo halo_;  // of convolutions forward, whose tiles are the output's
  int threads_;
  int64_t tiles_, blocks_;  // tiles handled together, and how many times
  int64_t v_start_[kFrequencies + 1], m_start_[kFrequencies + 1];
  bool shared_;
};

// ---- weight gradient ---------------------------------------------------------------

// Of each frequency, how many values of its group come before its own; of each group, how many it has.
template <class Form>
struct GroupLayout {
  int first[Form::kFrequencies] = {}, values[Form::kGroups] = {};

  constexpr GroupLayout() {
    for (int f = 0; f < Form::kFrequencies; ++f) {
      first[f] = values[Form::GroupOf(f)];
      values[Form::GroupOf(f)] += Form::Instances(f);
    }
  }
};

// Split into tasks (group of frequencies, range of tiles, range of output channels). A
// task's part of dU stays in L2 while its tiles pass by; ranges of tiles have sums of
// their own, added in order at the end.
template <class Form>
class WeightGradient {
  static constexpr int kTile = Form::kTile, kSize = Form::kSize, kFrequencies = Form::kFrequencies;
  static constexpr int kTiles = Form::kGradientTiles, kGroups = Form::kGroups;

  static constexpr GroupLayout<Form> kLayout{};

 public:
  WeightGradient(const LaneMap& x, const LaneMap& dy, int threads)
      : x_(x), dy_(dy), grid_(dy, kTile), threads_(threads), blocks_(CeilDiv(grid_.count, kTiles)) {
    in_ = RoundUp(x.channels, kLanes);
    splits_ = blocks_ >= 64 ? 4 : blocks_ >= 2 ? 2 : 1;  // a function of the size alone: it decides the sums' order
    parts_ = AtMost(CeilDiv(2 * threads, kGroups * splits_), CeilDiv(dy.channels, kRows));
    part_channels_ = RoundUp(CeilDiv(dy.channels, parts_), kRows);
    parts_ = CeilDiv(dy.channels, part_channels_);
    for (int f = 0; f < kFrequencies; ++f) {
      a_start_[f] = kLayout.first[f] * (kTiles * kLanes * part_channels_ + kSkew);
      b_start_[f] = kLayout.first[f] * (kTiles * kLanes * in_ + kSkew);
    }
    sum_step_ = dy.channels * in_ + kSkew;
    sum_floats_ = kFrequencies * sum_step_;
  }

  int64_t ScratchFloats() const { return splits_ * sum_floats_ + threads_ * (AFloats() + BFloats()); }

  void Run(float* dw, float* scratch) const {
    float* slots = scratch + splits_ * sum_floats_;
    ForEachItem(threads_, kGroups * splits_ * parts_, [&](int64_t slot, int64_t item) {
      const int64_t part = item % parts_, turn = item / parts_ % kGroups, split = item / parts_ / kGroups;
      const int64_t group = turn % 2 ? kGroups - 1 - turn / 2 : turn / 2;  // the largest beside the smallest
      float* sums = scratch + split * sum_floats_;
      float* mine = slots + slot * (AFloats() + BFloats());
      if (group == 0) Task<0>(split, part, sums, mine);
      if (group == 1) Task<1>(split, part, sums, mine);
      if constexpr (kGroups > 2) {
        if (group == 2) Task<2>(split, part, sums, mine);
      }
      if constexpr (kGroups > 3) {
        if (group == 3) Task<3>(split, part, sums, mine);
      }
    });
    ParallelFor(threads_, dy_.channels, [&](int64_t out) { FromFrequencies(out, scratch, dw); });
  }

 private:
  static constexpr int MostValues() {
    int most = 0;
    for (int values : kLayout.values) most = values > most ? values : most;
    return most;
  }
  int64_t AFloats() const { return MostValues() * (kTiles * kLanes * part_channels_ + kSkew); }
  int64_t BFloats() const { return MostValues() * (kTiles * kLanes * in_ + kSkew); }

  template <int kGroup>
  void Task(int64_t split, int64_t part, float* sums, float* scratch) const {
    const int64_t first = part * part_channels_, count = AtMost(part_channels_, dy_.channels - first);
    float* a = scratch;              // dM [frequency][out][value of a tile][lane], see LeftAt
    float* b = scratch + AFloats();  // V^T [frequency][panel][value of a tile][lane][in of the panel]
    const int64_t begin = blocks_ * split / splits_, end = blocks_ * (split + 1) / splits_;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t tiles = AtMost(kTiles, grid_.count - block * kTiles);
      TilePosition at[kTiles];
      for (int64_t t = 0; t < tiles; ++t) at[t] = TileAt(dy_, grid_, kTile, block * kTiles + t);
      TransformGradient<kGroup>(at, tiles, first, count, a);
      TransformInput<kGroup>(at, tiles, b);
      for (int f = 0; f < kFrequencies; ++f) {
        if (Form::GroupOf(f) != kGroup) continue;
        const int64_t values = Form::Instances(f), length = tiles * values * kLanes, depth = Depth(length);
        float* sum = sums + f * sum_step_ + first * in_;
        for (int64_t c = 0; c < in_; c += kCols * kLanes) {
          const int cols = static_cast<int>(AtMost(kCols, (in_ - c) / kLanes));
          for (int64_t k = 0; k < length; k += depth) {
            const float* panel = b + b_start_[f] + c * length + k * cols * kLanes;
            MultiplyPanel(a + a_start_[f] + k * kRows, kTiles * values * kLanes, count, panel, cols, sum + c, in_,
                          AtMost(depth, length - k), block > begin || k > 0, panel);
          }
        }
      }
    }
  }

  template <int kGroup>
  void TransformGradient(const TilePosition* at, int64_t tiles, int64_t first, int64_t count, float* a) const {
    alignas(64) float copy[kTile * kTile * kLanes];
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t t = 0; t < tiles; ++t) {
        const Patch patch = PatchAt<kTile>(dy_, at[t], first + c, 0, 1, kTile, copy);
        for (int lane = 0; lane < kLanes; lane += kRegisterLanes) {
          Form::template Gradient<kGroup>(patch, lane, [&](int f, int instance, R value) {
            const int64_t values = Form::Instances(f), at_value = (t * values + instance) * kLanes;
            Store(a + a_start_[f] + LeftAt(c, at_value, kTiles * values * kLanes) + lane, value);
          });
        }
      }
    }
  }

  template <int kGroup>
  void TransformInput(const TilePosition* at, int64_t tiles, float* b) const {
    constexpr int kValues = kLayout.values[kGroup];
    alignas(64) float copy[Form::kPatch * Form::kPatch * kLanes];
    alignas(64) float values[kValues][kLanes * kLanes];  // 16 channels, to be transposed
    for (int64_t c = 0; c < in_; c += kLanes) {
      const int64_t panel = c / (kCols * kLanes) * (kCols * kLanes), cols = AtMost(kCols, (in_ - panel) / kLanes);
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t k = 0; k < kLanes; ++k) {
          if (c + k >= x_.channels) {
            for (int i = 0; i < kValues; ++i) Store(values[i] + k * kLanes, Zero());
            continue;
          }
          const Patch patch = PatchAt<Form::kPatch>(x_, at[t], c + k, Form::kBorder, Form::kInStep, kTile, copy);
          for (int lane = 0; lane < kLanes; lane += kRegisterLanes) {
            Form::template Input<kGroup>(patch, lane, [&](int f, int instance, R value) {
              Store(values[kLayout.first[f] + instance] + k * kLanes + lane, value);
            });
          }
        }
        for (int f = 0; f < kFrequencies; ++f) {
          if (Form::GroupOf(f) != kGroup) continue;
          const int64_t instances = Form::Instances(f), depth = tiles * instances * kLanes;
          float* to = b + b_start_[f] + panel * depth + (t * instances * kLanes * cols) * kLanes + (c - panel);
          for (int64_t i = 0; i < instances; ++i) {
            TransposeBlock(values[kLayout.first[f] + i], to + i * kLanes * cols * kLanes, cols * kLanes);
          }
        }
      }
    }
  }

  // dw = G^T dU G of one output channel.
  void FromFrequencies(int64_t out, const float* sums, float* dw) const {
    constexpr int kTaps = Form::kTaps, kPlaces = kTaps * kTaps;
    for (int64_t c = 0; c < in_; c += kLanes) {
      V half[kTaps][kSize];
      for (int s = 0; s < kSize; ++s) {
        V column[kSize], line[kTaps];
        for (int r = 0; r < kSize; ++r) {
          const float* from = sums + (r * kSize + s) * sum_step_ + out * in_ + c;
          column[r] = Load(from);
          Prefetch(from + kLanes);  // each frequency is a stream of its own, too many for the hardware to follow
          for (int64_t split = 1; split < splits_; ++split) {
            column[r] = Add(column[r], Load(from + split * sum_floats_));
            Prefetch(from + split * sum_floats_ + kLanes);
          }
        }
        Form::WeightGradient(column, line);
        for (int r = 0; r < kTaps; ++r) half[r][s] = line[r];
      }
      alignas(64) float taps[kPlaces][kLanes];
      for (int r = 0; r < kTaps; ++r) {
        V line[kTaps];
        Form::WeightGradient(half[r], line);
        for (int s = 0; s < kTaps; ++s) Store(taps[r * kTaps + s], line[s]);
      }
      float* to = dw + (out * x_.channels + c) * kPlaces;
      for (int64_t i = 0; i < AtMost(kLanes, x_.channels - c); ++i) {
        for (int t = 0; t < kPlaces; ++t) to[i * kPlaces + t] = taps[t][i];
      }
    }
  }

  LaneMap x_, dy_;
  TileGrid grid_;
  int threads_;
  int64_t blocks_, in_, splits_, parts_, part_channels_;
  int64_t a_start_[kFrequencies], b_start_[kFrequencies], sum_step_, sum_floats_;
};

// ---- the tables ----------------------------------------------------------------------

template <template <int> class Form>
void TransformWeightsOf(const float* w, int64_t out, int64_t in, bool transposed, int tile, float* u, int threads) {
  if (tile == 4) {
    TransformWeights<Form<4>>(w, out, in, transposed, u, threads);
  } else {
    TransformWeights<Form<2>>(w, out, in, transposed, u, threads);
  }
}

template <template <int> class Form>
void ForwardOf(const LaneMap& x, const float* u, const float* bias, const LaneMap& y, const ConvEnd& end, int tile,
               float* scratch, int threads) {
  if (tile == 4) {
    Forward<Form<4>>(x, y, end, threads).Run(u, bias, scratch);
  } else {
    Forward<Form<2>>(x, y, end, threads).Run(u, bias, scratch);
  }
}

template <template <int> class Form>
int64_t ForwardScratchOf(const LaneMap& x, const LaneMap& y, int tile, int threads) {
  return tile == 4 ? Forward<Form<4>>(x, y, {}, threads).ScratchFloats()
                   : Forward<Form<2>>(x, y, {}, threads).ScratchFloats();
}

template <template <int> class Form>
void WeightGradientOf(const LaneMap& x, const LaneMap& dy, float* dw, int tile, float* scratch, int threads) {
  if (tile == 4) {
    WeightGradient<Form<4>>(x, dy, threads).Run(dw, scratch);
  } else {
    WeightGradient<Form<2>>(x, dy, threads).Run(dw, scratch);
  }
}

template <template <int> class Form>
int64_t WeightGradientScratchOf(const LaneMap& x, const LaneMap& dy, int tile, int threads) {
  return tile == 4 ? WeightGradient<Form<4>>(x, dy, threads).ScratchFloats()
                   : WeightGradient<Form<2>>(x, dy, threads).ScratchFloats();
}

template <template <int> class Form, template <int> class Transposed>
constexpr WinogradKernels KernelsOf() {
  return {TransformWeightsOf<Form>,     ForwardOf<Form>,        ForwardScratchOf<Form>,       ForwardOf<Transposed>,
          ForwardScratchOf<Transposed>, WeightGradientOf<Form>, WeightGradientScratchOf<Form>};
}

}  // namespace

extern const WinogradKernels winograd_kernels;
const WinogradKernels winograd_kernels = KernelsOf<Stride1, Stride1>();
extern const FiveTapWinogradKernels five_tap_winograd_kernels;
const FiveTapWinogradKernels five_tap_winograd_kernels = {KernelsOf<FiveTaps, FiveTaps>()};
extern const StridedWinogradKernels strided_winograd_kernels;
const StridedWinogradKernels strided_winograd_kernels = {KernelsOf<Stride2, Stride2Transposed>()};

}  // namespace LIPFAST_NS
}  // namespace lipfast
