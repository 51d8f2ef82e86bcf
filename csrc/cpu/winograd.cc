#include "cpu/winograd.h"

#include "cpu/activation.h"
#include "cpu/pool.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// ---- sizes -----------------------------------------------------------------

// Tiles handled together. Larger: the weights, which no L2 cache holds, are read less
// often. Smaller: more of the transforms stays in L2, and more threads find work.
constexpr int kTiles = 4, kGradientTiles = 8;
// The register block of the matrix products: kRows scalars times kCols vectors.
constexpr int kCols = kRegisters >= 32 ? 4 : 1;
constexpr int kRows = kRegisters >= 8 ? 6 : 2;
constexpr int64_t kDepth = 160;               // longest inner product at once: kDepth x kCols vectors stay in L1
constexpr int64_t kOutChannels = 22 * kRows;  // output channels multiplied before their inverse transform
constexpr int64_t kSkew = 5 * kLanes;         // floats between frequencies, so that they fall into different cache sets

int64_t AtMost(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
int64_t CommonDivisor(int64_t a, int64_t b) { return b ? CommonDivisor(b, a % b) : a; }

// Calls body(slot, item) for every item; slot < threads names scratch memory that
// no other thread is using.
template <class Body>
void ForEachItem(int threads, int64_t items, const Body& body) {
  int64_t next = 0;
  ParallelFor(threads, AtMost(threads, items), [&](int64_t slot) {
    for (int64_t item; (item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < items;) body(slot, item);
  });
}

// ---- one-dimensional transforms ----------------------------------------------
// Frequencies come in pairs (lo, hi) that share work: rows 1 and 2, 3 and 4, and the
// first and the last. kPair counts them in this order.

template <int kTile>
struct Points;

template <>
struct Points<4> {
  static constexpr int kSize = 6, kPairs = 3;
  static constexpr int Lo(int pair) { return pair == 2 ? 0 : 2 * pair + 1; }
  static constexpr int Hi(int pair) { return pair == 2 ? 5 : 2 * pair + 2; }

  // Points 0, +-kA, +-kB and infinity; all constants below are exact in float.
  static constexpr float kA = 0.625f, kB = 1.5f;
  static constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA * kA2, kB3 = kB * kB2;

  // B^T d
  template <int kPair>
  static inline void Input(const R* d, R& lo, R& hi) {
    if (kPair == 2) {
      lo = Fma(SetR(kA2 * kB2), d[0], Fma(SetR(-kA2 - kB2), d[2], d[4]));
      hi = Fma(SetR(kA2 * kB2), d[1], Fma(SetR(-kA2 - kB2), d[3], d[5]));
    } else {
      const float point = kPair == 0 ? kA : kB, other2 = kPair == 0 ? kB2 : kA2;
      const R even = Fma(SetR(-other2), d[2], d[4]), odd = Fma(SetR(-other2), d[1], d[3]);
      lo = Fma(SetR(point), odd, even);
      hi = Fma(SetR(-point), odd, even);
    }
  }

  // A d, from 4 pixels of an output gradient
  template <int kPair>
  static inline void Gradient(const R* d, R& lo, R& hi) {
    if (kPair == 2) {
      lo = d[0];
      hi = d[3];
    } else {
      const float point = kPair == 0 ? kA : kB;
      const R even = Fma(SetR(point * point), d[2], d[0]), odd = Fma(SetR(point * point), d[3], d[1]);
      lo = Fma(SetR(point), odd, even);
      hi = Fma(SetR(-point), odd, even);
    }
  }

  // A^T m
  static inline void Output(const V* m, V* y) {
    const V sum_a = Add(m[1], m[2]), difference_a = Sub(m[1], m[2]);
    const V sum_b = Add(m[3], m[4]), difference_b = Sub(m[3], m[4]);
    y[0] = Add(Add(m[0], sum_a), sum_b);
    y[1] = Fma(Set(kB), difference_b, Mul(Set(kA), difference_a));
    y[2] = Fma(Set(kB2), sum_b, Mul(Set(kA2), sum_a));
    y[3] = Fma(Set(kB3), difference_b, Fma(Set(kA3), difference_a, m[5]));
  }

  // One over the product of a point's distances to the other points.
  static constexpr float kScale0 = 1 / (kA2 * kB2);
  static constexpr float kScaleA = 1 / (2 * kA2 * (kA2 - kB2)), kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

  // G w
  static inline void Weight(const V* w, V* u) {
    const V even_a = Mul(Set(kScaleA), Fma(Set(kA2), w[2], w[0]));
    const V even_b = Mul(Set(kScaleB), Fma(Set(kB2), w[2], w[0]));
    u[0] = Mul(Set(kScale0), w[0]);
    u[1] = Fma(Set(kScaleA * kA), w[1], even_a);
    u[2] = Fma(Set(-kScaleA * kA), w[1], even_a);
    u[3] = Fma(Set(kScaleB * kB), w[1], even_b);
    u[4] = Fma(Set(-kScaleB * kB), w[1], even_b);
    u[5] = w[2];
  }

  // G^T u
  static inline void WeightGradient(const V* u, V* w) {
    const V sum_a = Mul(Set(kScaleA), Add(u[1], u[2])), sum_b = Mul(Set(kScaleB), Add(u[3], u[4]));
    w[0] = Fma(Set(kScale0), u[0], Add(sum_a, sum_b));
    w[1] = Fma(Set(kScaleA * kA), Sub(u[1], u[2]), Mul(Set(kScaleB * kB), Sub(u[3], u[4])));
    w[2] = Fma(Set(kA2), sum_a, Fma(Set(kB2), sum_b, u[5]));
  }
};

template <>
struct Points<2> {
  static constexpr int kSize = 4, kPairs = 2;
  static constexpr int Lo(int pair) { return pair == 1 ? 0 : 1; }
  static constexpr int Hi(int pair) { return pair == 1 ? 3 : 2; }

  template <int kPair>
  static inline void Input(const R* d, R& lo, R& hi) {
    lo = kPair == 0 ? Add(d[1], d[2]) : Sub(d[0], d[2]);
    hi = kPair == 0 ? Sub(d[2], d[1]) : Sub(d[1], d[3]);
  }
  template <int kPair>
  static inline void Gradient(const R* d, R& lo, R& hi) {
    lo = kPair == 0 ? Add(d[0], d[1]) : d[0];
    hi = kPair == 0 ? Sub(d[0], d[1]) : Sub(SetR(0.0f), d[1]);
  }
  static inline void Output(const V* m, V* y) {
    y[0] = Add(Add(m[0], m[1]), m[2]);
    y[1] = Sub(Sub(m[1], m[2]), m[3]);
  }
  static inline void Weight(const V* w, V* u) {
    const V ends = Mul(Set(0.5f), Add(w[0], w[2]));
    u[0] = w[0];
    u[1] = Fma(Set(0.5f), w[1], ends);
    u[2] = Fma(Set(-0.5f), w[1], ends);
    u[3] = w[2];
  }
  static inline void WeightGradient(const V* u, V* w) {
    const V sum = Mul(Set(0.5f), Add(u[1], u[2]));
    w[0] = Add(u[0], sum);
    w[1] = Mul(Set(0.5f), Sub(u[1], u[2]));
    w[2] = Add(u[3], sum);
  }
};

// ---- tiles -------------------------------------------------------------------

// The tiles of a map in the order of images, rows, columns.
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

// kSize x kSize vectors, rows `stride` floats apart.
struct Patch {
  const float* data;
  int64_t stride;
};

// The vectors of channel c from `border` rows and columns before the tile on. A
// patch that a block's edge cuts is copied to `copy`, with zeros outside, so nothing
// beyond a halo of `border` is read.
template <int kSize>
Patch PatchAt(const LaneMap& m, const TilePosition& p, int64_t c, int border, int tile, float* copy) {
  const float* data = m.At(p.image, c, p.row - border, p.col - border);
  if (p.live_rows == tile && p.live_cols == tile) return {data, m.row_stride};
  for (int r = 0; r < kSize; ++r) {
    for (int s = 0; s < kSize; ++s) {
      const bool live = r < p.live_rows + 2 * border && s < p.live_cols + 2 * border;
      Store(copy + (r * kSize + s) * kLanes, live ? Load(data + r * m.row_stride + s * kLanes) : Zero());
    }
  }
  return {copy, kSize * kLanes};
}

// Two rows of frequencies of one tile, in the lanes from `lane` on that fit a register:
// v[0] is row Lo(kPair), v[1] row Hi(kPair).
template <int kTile, int kPair>
inline void InputRows(const Patch& x, int lane, R (&v)[2][kTile + 2]) {
  using P = Points<kTile>;
  R line[2][P::kSize];
  LIPFAST_UNROLL
  for (int s = 0; s < P::kSize; ++s) {
    R d[P::kSize];
    LIPFAST_UNROLL
    for (int r = 0; r < P::kSize; ++r) d[r] = LoadR(x.data + r * x.stride + s * kLanes + lane);
    P::template Input<kPair>(d, line[0][s], line[1][s]);
  }
  LIPFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    P::template Input<0>(line[i], v[i][P::Lo(0)], v[i][P::Hi(0)]);
    P::template Input<1>(line[i], v[i][P::Lo(1)], v[i][P::Hi(1)]);
    if (P::kPairs == 3) P::template Input<P::kPairs - 1>(line[i], v[i][P::Lo(2)], v[i][P::kSize - 1]);
  }
}

// The same of an output gradient's tile.
template <int kTile, int kPair>
inline void GradientRows(const Patch& dy, int lane, R (&v)[2][kTile + 2]) {
  using P = Points<kTile>;
  R line[2][kTile];
  LIPFAST_UNROLL
  for (int s = 0; s < kTile; ++s) {
    R d[kTile];
    LIPFAST_UNROLL
    for (int r = 0; r < kTile; ++r) d[r] = LoadR(dy.data + r * dy.stride + s * kLanes + lane);
    P::template Gradient<kPair>(d, line[0][s], line[1][s]);
  }
  LIPFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    P::template Gradient<0>(line[i], v[i][P::Lo(0)], v[i][P::Hi(0)]);
    P::template Gradient<1>(line[i], v[i][P::Lo(1)], v[i][P::Hi(1)]);
    if (P::kPairs == 3) P::template Gradient<P::kPairs - 1>(line[i], v[i][P::Lo(2)], v[i][P::kSize - 1]);
  }
}

// ---- matrix product ------------------------------------------------------------

// Into L2 only: there is no room to spare in L1.
inline void PrefetchL2(const float* p) { __builtin_prefetch(p, 0, 2); }

// c[r][..] (+)= sum over k < depth of a[r][k] b[k][..] for kR rows and kC vectors.
// b is packed, [depth][kC]; `ahead` is where the rows of the next call's a begin.
template <int kR, int kC>
void Multiply(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride, int64_t depth, bool add,
              const float* ahead) {
  V sum[kR][kC];
  LIPFAST_UNROLL
  for (int r = 0; r < kR; ++r) {
    LIPFAST_UNROLL
    for (int s = 0; s < kC; ++s) sum[r][s] = add ? Load(c + r * c_stride + s * kLanes) : Zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    if (k % kLanes == 0) {
      LIPFAST_UNROLL
      for (int r = 0; r < kR; ++r) PrefetchL2(ahead + r * a_stride + k);
    }
    V v[kC];
    LIPFAST_UNROLL
    for (int s = 0; s < kC; ++s) v[s] = Load(b + (k * kC + s) * kLanes);
    LIPFAST_UNROLL
    for (int r = 0; r < kR; ++r) {
      const V w = Set(a[r * a_stride + k]);
      LIPFAST_UNROLL
      for (int s = 0; s < kC; ++s) sum[r][s] = Fma(w, v[s], sum[r][s]);
    }
  }
  LIPFAST_UNROLL
  for (int r = 0; r < kR; ++r) {
    LIPFAST_UNROLL
    for (int s = 0; s < kC; ++s) Store(c + r * c_stride + s * kLanes, sum[r][s]);
  }
}

using MultiplyFunction = void (*)(const float*, int64_t, const float*, float*, int64_t, int64_t, bool, const float*);

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

// c [rows][c_stride] (+)= a [rows][a_stride] times b [depth][cols], cols <= kCols.
void MultiplyPanel(const float* a, int64_t a_stride, int64_t rows, const float* b, int cols, float* c, int64_t c_stride,
                   int64_t depth, bool add) {
  const MultiplyFunction full = MultiplyFor<kRows, kCols>(kRows, cols);
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    full(a + r * a_stride, a_stride, b, c + r * c_stride, c_stride, depth, add, a + (r + kRows) * a_stride);
  }
  if (r < rows) {
    MultiplyFor<kRows, kCols>(static_cast<int>(rows - r), cols)(a + r * a_stride, a_stride, b, c + r * c_stride,
                                                                c_stride, depth, add, a + r * a_stride);
  }
}

// ---- weights ---------------------------------------------------------------------

template <int kTile>
void TransformWeights(const float* w, int64_t out, int64_t in, bool transposed, float* u, int threads) {
  using P = Points<kTile>;
  // Rows and columns of the matrices U; the vector runs along a row.
  const int64_t rows = transposed ? in : out, cols = transposed ? out : in;
  const int64_t row_step = transposed ? 9 : 9 * in, col_step = transposed ? 9 * in : 9;
  ParallelFor(threads, rows, [&](int64_t row) {
    for (int64_t col = 0; col < cols; col += kLanes) {
      const int n = static_cast<int>(AtMost(kLanes, cols - col));
      alignas(64) float taps[9][kLanes] = {};
      for (int i = 0; i < n; ++i) {
        const float* filter = w + row * row_step + (col + i) * col_step;
        for (int t = 0; t < 9; ++t) taps[transposed ? 8 - t : t][i] = filter[t];
      }
      V half[P::kSize][3];  // G w
      for (int s = 0; s < 3; ++s) {
        const V column[3] = {Load(taps[s]), Load(taps[3 + s]), Load(taps[6 + s])};
        V line[P::kSize];
        P::Weight(column, line);
        for (int r = 0; r < P::kSize; ++r) half[r][s] = line[r];
      }
      for (int r = 0; r < P::kSize; ++r) {
        V line[P::kSize];
        P::Weight(half[r], line);
        for (int s = 0; s < P::kSize; ++s) StorePart(u + ((r * P::kSize + s) * rows + row) * cols + col, line[s], n);
      }
    }
  });
}

// ---- forward -----------------------------------------------------------------------

template <int kTile>
class Forward {
  using P = Points<kTile>;
  static constexpr int kSize = P::kSize, kFrequencies = kSize * kSize;

 public:
  Forward(const LaneMap& x, const LaneMap& y, const ConvEnd& end, int threads)
      : x_(x), y_(y), grid_(x, kTile), end_(end), threads_(threads), blocks_(CeilDiv(grid_.count, kTiles)) {
    v_step_ = x.channels * kTiles * kLanes + kSkew;
    m_step_ = AtMost(y.channels, kOutChannels) * kTiles * kLanes + kSkew;
    // Few tiles: threads share the transformed input and divide the output channels.
    shared_ = blocks_ < 2 * threads;
  }

  int64_t ScratchFloats() const {
    return kFrequencies * (v_step_ * (shared_ ? blocks_ : threads_) + m_step_ * threads_);
  }

  void Run(const float* u, const float* bias, float* scratch) const {
    float* v = scratch;
    float* m = scratch + kFrequencies * v_step_ * (shared_ ? blocks_ : threads_);
    if (shared_) {
      RunShared(u, bias, v, m);
      return;
    }
    ForEachItem(threads_, blocks_, [&](int64_t slot, int64_t block) {
      float* block_v = v + slot * kFrequencies * v_step_;
      TransformInput(block, 0, x_.channels, block_v);
      for (int64_t out = 0; out < y_.channels; out += kOutChannels) {
        OutputChannels(block, out, AtMost(kOutChannels, y_.channels - out), u, bias, block_v,
                       m + slot * kFrequencies * m_step_);
      }
    });
  }

 private:
  void RunShared(const float* u, const float* bias, float* v, float* m) const {
    constexpr int64_t kInPart = 16;
    const int64_t in_parts = CeilDiv(x_.channels, kInPart);
    // Few large parts, for each reads all of v; as many for one thread as for another.
    const int64_t fair_parts = threads_ / CommonDivisor(blocks_, threads_);
    const int64_t out_part = AtMost(RoundUp(CeilDiv(y_.channels, fair_parts), kRows), kOutChannels);
    const int64_t out_parts = CeilDiv(y_.channels, out_part);
    ForEachItem(threads_, blocks_ * in_parts, [&](int64_t, int64_t item) {
      const int64_t block = item / in_parts, from = item % in_parts * kInPart;
      TransformInput(block, from, AtMost(from + kInPart, x_.channels), v + block * kFrequencies * v_step_);
    });
    ForEachItem(threads_, blocks_ * out_parts, [&](int64_t slot, int64_t item) {
      const int64_t block = item / out_parts, from = item % out_parts * out_part;
      OutputChannels(block, from, AtMost(out_part, y_.channels - from), u, bias, v + block * kFrequencies * v_step_,
                     m + slot * kFrequencies * m_step_);
    });
  }

  int64_t TilesIn(int64_t block) const { return AtMost(kTiles, grid_.count - block * kTiles); }

  // v [frequency][panel][channel][tiles of the panel]
  void TransformInput(int64_t block, int64_t first, int64_t last, float* v) const {
    const int64_t tiles = TilesIn(block);
    TilePosition at[kTiles];
    for (int64_t t = 0; t < tiles; ++t) at[t] = TileAt(x_, grid_, kTile, block * kTiles + t);
    alignas(64) float copy[kFrequencies * kLanes];
    for (int64_t c = first; c < last; ++c) {
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t panel = t / kCols, cols = AtMost(kCols, tiles - panel * kCols);
        float* to = v + ((panel * x_.channels * kCols) + c * cols + t % kCols) * kLanes;
        const Patch patch = PatchAt<kSize>(x_, at[t], c, 1, kTile, copy);
        StoreRows<0>(patch, to);
        StoreRows<1>(patch, to);
        if (P::kPairs == 3) StoreRows<P::kPairs - 1>(patch, to);
      }
    }
  }

  template <int kPair>
  void StoreRows(const Patch& patch, float* to) const {
    for (int lane = 0; lane < kLanes; lane += kRegisterLanes) {
      R v[2][kSize];
      InputRows<kTile, kPair>(patch, lane, v);
      LIPFAST_UNROLL
      for (int s = 0; s < kSize; ++s) {
        Store(to + (P::Lo(kPair) * kSize + s) * v_step_ + lane, v[0][s]);
        Store(to + (P::Hi(kPair) * kSize + s) * v_step_ + lane, v[1][s]);
      }
    }
  }

  // Output channels first .. first + count - 1 of a block; m [frequency][channel][tile].
  void OutputChannels(int64_t block, int64_t first, int64_t count, const float* u, const float* bias, const float* v,
                      float* m) const {
    const int64_t tiles = TilesIn(block), in = x_.channels;
    for (int f = 0; f < kFrequencies; ++f) {
      const float* rows = u + (f * y_.channels + first) * in;
      for (int64_t k = 0; k < in; k += kDepth) {
        for (int64_t t = 0; t < tiles; t += kCols) {
          const int cols = static_cast<int>(AtMost(kCols, tiles - t));
          MultiplyPanel(rows + k, in, count, v + f * v_step_ + (t * in + k * cols) * kLanes, cols,
                        m + f * m_step_ + t * kLanes, kTiles * kLanes, AtMost(kDepth, in - k), k > 0);
        }
      }
    }
    TilePosition at[kTiles];
    for (int64_t t = 0; t < tiles; ++t) at[t] = TileAt(y_, grid_, kTile, block * kTiles + t);
    for (int64_t c = 0; c < count; ++c) {
      const V scale = Set(end_.scale ? end_.scale[first + c] : 1.0f), offset = Set(bias ? bias[first + c] : 0.0f);
      for (int64_t t = 0; t < tiles; ++t) StoreTile(m + (c * kTiles + t) * kLanes, scale, offset, at[t], first + c);
    }
  }

  void StoreTile(const float* m, V scale, V offset, const TilePosition& at, int64_t channel) const {
    V half[kTile][kSize];
    LIPFAST_UNROLL
    for (int s = 0; s < kSize; ++s) {
      V column[kSize], line[kTile];
      LIPFAST_UNROLL
      for (int r = 0; r < kSize; ++r) column[r] = Load(m + (r * kSize + s) * m_step_);
      P::Output(column, line);
      LIPFAST_UNROLL
      for (int r = 0; r < kTile; ++r) half[r][s] = line[r];
    }
    float* to = y_.At(at.image, channel, at.row, at.col);
    const float* add = end_.residual ? end_.residual->At(at.image, channel, at.row, at.col) : nullptr;
    const bool whole = at.live_rows == kTile && at.live_cols == kTile;
    LIPFAST_UNROLL
    for (int r = 0; r < kTile; ++r) {
      V line[kTile];
      P::Output(half[r], line);
      LIPFAST_UNROLL
      for (int s = 0; s < kTile; ++s) {
        if (!whole && (r >= at.live_rows || s >= at.live_cols)) continue;
        V sum = Fma(scale, line[s], offset);
        if (add) sum = Add(sum, Load(add + r * end_.residual->row_stride + s * kLanes));
        Store(to + r * y_.row_stride + s * kLanes, SimpleAct(sum, end_.act));
      }
    }
  }

  LaneMap x_, y_;
  TileGrid grid_;
  ConvEnd end_;
  int threads_;
  int64_t blocks_, v_step_, m_step_;
  bool shared_;
};

// ---- weight gradient ---------------------------------------------------------------

// Split into tasks (pair of frequency rows, range of tiles, range of output channels).
// A task's part of dU stays in L2 while its tiles pass by; ranges of tiles have sums of
// their own, added in order at the end.
template <int kTile>
class WeightGradient {
  using P = Points<kTile>;
  static constexpr int kSize = P::kSize, kFrequencies = kSize * kSize, kRowFrequencies = 2 * kSize;

 public:
  WeightGradient(const LaneMap& x, const LaneMap& dy, int threads)
      : x_(x), dy_(dy), grid_(x, kTile), threads_(threads), blocks_(CeilDiv(grid_.count, kGradientTiles)) {
    in_ = RoundUp(x.channels, kLanes);
    splits_ = blocks_ >= 64 ? 4 : blocks_ >= 2 ? 2 : 1;  // a function of the size alone: it decides the sums' order
    parts_ = AtMost(CeilDiv(2 * threads, P::kPairs * splits_), CeilDiv(dy.channels, kRows));
    part_channels_ = RoundUp(CeilDiv(dy.channels, parts_), kRows);
    parts_ = CeilDiv(dy.channels, part_channels_);
    a_step_ = part_channels_ * kGradientTiles * kLanes + kSkew;
    b_step_ = in_ * kGradientTiles * kLanes + kSkew;
    sum_floats_ = kFrequencies * dy.channels * in_;
  }

  int64_t ScratchFloats() const { return splits_ * sum_floats_ + threads_ * SlotFloats(); }

  void Run(float* dw, float* scratch) const {
    float* slots = scratch + splits_ * sum_floats_;
    ForEachItem(threads_, P::kPairs * splits_ * parts_, [&](int64_t slot, int64_t item) {
      const int64_t part = item % parts_, split = item / parts_ % splits_, pair = item / parts_ / splits_;
      float* sums = scratch + split * sum_floats_;
      float* mine = slots + slot * SlotFloats();
      if (pair == 0) Task<0>(split, part, sums, mine);
      if (pair == 1) Task<1>(split, part, sums, mine);
      if (P::kPairs == 3 && pair == 2) Task<P::kPairs - 1>(split, part, sums, mine);
    });
    ParallelFor(threads_, dy_.channels, [&](int64_t out) { FromFrequencies(out, scratch, dw); });
  }

 private:
  int64_t SlotFloats() const { return kRowFrequencies * (a_step_ + b_step_); }

  template <int kPair>
  void Task(int64_t split, int64_t part, float* sums, float* scratch) const {
    const int64_t first = part * part_channels_, count = AtMost(part_channels_, dy_.channels - first);
    float* a = scratch;                              // dM [frequency][out][tile][lane]
    float* b = scratch + kRowFrequencies * a_step_;  // V^T [frequency][panel][tile][lane][in of the panel]
    const int64_t begin = blocks_ * split / splits_, end = blocks_ * (split + 1) / splits_;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t tiles = AtMost(kGradientTiles, grid_.count - block * kGradientTiles), depth = tiles * kLanes;
      TilePosition at[kGradientTiles];
      for (int64_t t = 0; t < tiles; ++t) at[t] = TileAt(x_, grid_, kTile, block * kGradientTiles + t);
      TransformGradient<kPair>(at, tiles, first, count, a);
      TransformInput<kPair>(at, tiles, b);
      for (int i = 0; i < kRowFrequencies; ++i) {
        const int row = i < kSize ? P::Lo(kPair) : P::Hi(kPair);
        float* sum = sums + ((row * kSize + i % kSize) * dy_.channels + first) * in_;
        for (int64_t c = 0; c < in_; c += kCols * kLanes) {
          const int cols = static_cast<int>(AtMost(kCols, (in_ - c) / kLanes));
          MultiplyPanel(a + i * a_step_, kGradientTiles * kLanes, count, b + i * b_step_ + c * depth, cols, sum + c,
                        in_, depth, block > begin);
        }
      }
    }
  }

  template <int kPair>
  void TransformGradient(const TilePosition* at, int64_t tiles, int64_t first, int64_t count, float* a) const {
    alignas(64) float copy[kTile * kTile * kLanes];
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t t = 0; t < tiles; ++t) {
        const Patch patch = PatchAt<kTile>(dy_, at[t], first + c, 0, kTile, copy);
        float* to = a + (c * kGradientTiles + t) * kLanes;
        for (int lane = 0; lane < kLanes; lane += kRegisterLanes) {
          R v[2][kSize];
          GradientRows<kTile, kPair>(patch, lane, v);
          LIPFAST_UNROLL
          for (int s = 0; s < kSize; ++s) {
            Store(to + s * a_step_ + lane, v[0][s]);
            Store(to + (kSize + s) * a_step_ + lane, v[1][s]);
          }
        }
      }
    }
  }

  template <int kPair>
  void TransformInput(const TilePosition* at, int64_t tiles, float* b) const {
    alignas(64) float copy[kFrequencies * kLanes];
    alignas(64) float rows[kRowFrequencies][kLanes * kLanes];  // 16 channels, to be transposed
    const int64_t depth = tiles * kLanes;
    for (int64_t c = 0; c < in_; c += kLanes) {
      const int64_t panel = c / (kCols * kLanes) * (kCols * kLanes), cols = AtMost(kCols, (in_ - panel) / kLanes);
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t k = 0; k < kLanes; ++k) {
          if (c + k >= x_.channels) {
            for (int i = 0; i < kRowFrequencies; ++i) Store(rows[i] + k * kLanes, Zero());
            continue;
          }
          const Patch patch = PatchAt<kSize>(x_, at[t], c + k, 1, kTile, copy);
          for (int lane = 0; lane < kLanes; lane += kRegisterLanes) {
            R v[2][kSize];
            InputRows<kTile, kPair>(patch, lane, v);
            LIPFAST_UNROLL
            for (int s = 0; s < kSize; ++s) {
              Store(rows[s] + k * kLanes + lane, v[0][s]);
              Store(rows[kSize + s] + k * kLanes + lane, v[1][s]);
            }
          }
        }
        float* to = b + panel * depth + (t * kLanes * cols) * kLanes + (c - panel);
        for (int i = 0; i < kRowFrequencies; ++i) TransposeBlock(rows[i], to + i * b_step_, cols * kLanes);
      }
    }
  }

  // dw = G^T dU G of one output channel.
  void FromFrequencies(int64_t out, const float* sums, float* dw) const {
    for (int64_t c = 0; c < in_; c += kLanes) {
      V half[3][kSize];
      for (int s = 0; s < kSize; ++s) {
        V column[kSize], line[3];
        for (int r = 0; r < kSize; ++r) {
          const float* from = sums + ((r * kSize + s) * dy_.channels + out) * in_ + c;
          column[r] = Load(from);
          for (int64_t split = 1; split < splits_; ++split)
            column[r] = Add(column[r], Load(from + split * sum_floats_));
        }
        P::WeightGradient(column, line);
        for (int r = 0; r < 3; ++r) half[r][s] = line[r];
      }
      alignas(64) float taps[9][kLanes];
      for (int r = 0; r < 3; ++r) {
        V line[3];
        P::WeightGradient(half[r], line);
        for (int s = 0; s < 3; ++s) Store(taps[3 * r + s], line[s]);
      }
      float* to = dw + (out * x_.channels + c) * 9;
      for (int64_t i = 0; i < AtMost(kLanes, x_.channels - c); ++i) {
        for (int t = 0; t < 9; ++t) to[i * 9 + t] = taps[t][i];
      }
    }
  }

  LaneMap x_, dy_;
  TileGrid grid_;
  int threads_;
  int64_t blocks_, in_, splits_, parts_, part_channels_;
  int64_t a_step_, b_step_, sum_floats_;
};

// ---- the table -----------------------------------------------------------------------

void TransformWeightsAny(const float* w, int64_t out, int64_t in, bool transposed, int tile, float* u, int threads) {
  if (tile == 4) {
    TransformWeights<4>(w, out, in, transposed, u, threads);
  } else {
    TransformWeights<2>(w, out, in, transposed, u, threads);
  }
}

void ForwardAny(const LaneMap& x, const float* u, const float* bias, const LaneMap& y, const ConvEnd& end, int tile,
                float* scratch, int threads) {
  if (tile == 4) {
    Forward<4>(x, y, end, threads).Run(u, bias, scratch);
  } else {
    Forward<2>(x, y, end, threads).Run(u, bias, scratch);
  }
}

int64_t ForwardScratch(const LaneMap& x, const LaneMap& y, int tile, int threads) {
  return tile == 4 ? Forward<4>(x, y, {}, threads).ScratchFloats() : Forward<2>(x, y, {}, threads).ScratchFloats();
}

void WeightGradientAny(const LaneMap& x, const LaneMap& dy, float* dw, int tile, float* scratch, int threads) {
  if (tile == 4) {
    WeightGradient<4>(x, dy, threads).Run(dw, scratch);
  } else {
    WeightGradient<2>(x, dy, threads).Run(dw, scratch);
  }
}

int64_t WeightGradientScratch(const LaneMap& x, const LaneMap& dy, int tile, int threads) {
  return tile == 4 ? WeightGradient<4>(x, dy, threads).ScratchFloats()
                   : WeightGradient<2>(x, dy, threads).ScratchFloats();
}

}  // namespace

extern const WinogradKernels winograd_kernels;
const WinogradKernels winograd_kernels = {TransformWeightsAny, ForwardAny, ForwardScratch, WeightGradientAny,
                                          WeightGradientScratch};

}  // namespace LIPFAST_NS
}  // namespace lipfast
