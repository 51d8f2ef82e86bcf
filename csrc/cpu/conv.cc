#include "cpu/conv.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/choice.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/taps.h"
#include "cpu/winograd.h"

namespace lipfast {
namespace {

constexpr int64_t kVector = kGrid * kGrid;

// What the sparse kernels' time is made of, in units of one multiply-add of a vector
// whose operand is in the first cache level (docs/kernels.md, "Blocks").
constexpr double kPartialSum = 3.0;  // a vector of sums that goes to memory and back
constexpr double kFarOperand = 0.9;  // what an operand from the second level adds
// Tiles of two rows save loads of weights but fill the first level sooner. They pay
// from this many taps of an output, times the share of input that the row adds;
// sooner in weight gradients, whose sums never go to memory.
constexpr double kTwoRows = 300, kTwoRowsOfGradient = 50;

int64_t FloorDiv(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
int64_t CeilDiv(int64_t a, int64_t b) { return FloorDiv(a + b - 1, b); }
int64_t RoundUp(int64_t floats) { return CeilDiv(floats, kVector) * kVector; }  // keeps what follows aligned

// body(first, last) for ranges that make up [0, count).
template <class Body>
void ForRanges(int threads, int64_t count, const Body& body) {
  constexpr int64_t kRange = 1 << 14;
  ParallelFor(threads, CeilDiv(count, kRange), [&](int64_t i) { body(i * kRange, std::min((i + 1) * kRange, count)); });
}

constexpr int64_t kFarthest = INT16_MAX;  // pixels: of a Source

// Where a weight reads, in pixels of the map that is read.
struct Source {
  int32_t channel;
  int16_t row, col;
  bool operator<(const Source& b) const { return std::tie(channel, row, col) < std::tie(b.channel, b.row, b.col); }
};

struct Tap {
  Source source;
  int32_t index;  // of the packed value
};

// The offsets of one pass for one set of map strides, in the kernels' form.
struct BoundTaps {
  std::vector<int32_t> starts, offsets, order, fresh;
  TapList sparse;
  DenseTaps dense;
};

// One visit of a map by one kernel call: a forward convolution, or one phase or
// border of an input gradient. Positions are pixels of a block, from (0, 0) on.
class Pass {
 public:
  int64_t rows = 0, cols = 0;         // positions
  int64_t out_row = 0, out_col = 0;   // the first position's pixel in the map that is written,
  int64_t in_row = 0, in_col = 0;     // and in the map that is read
  int64_t out_step = 1, in_step = 1;  // pixels from position to position
  bool dense = false;
  double two_rows = kTwoRows;

  // taps[o]: of output channel o, ascending by source.
  void SetTaps(std::vector<std::vector<Tap>> taps) {
    outputs_ = static_cast<int64_t>(taps.size());
    if (dense) {
      SetDense(taps);
    } else {
      for (const auto& row : taps) {
        for (const Tap& tap : row) {
          sources_.push_back(tap.source);
          index_.push_back(tap.index);
        }
        ends_.push_back(static_cast<int32_t>(sources_.size()));
      }
    }
    sources_.shrink_to_fit();
    // Where all kept weights come in their own order, as they do forward, no list is needed.
    in_order_ = true;
    for (size_t i = 0; i < index_.size(); ++i) in_order_ = in_order_ && index_[i] == static_cast<int32_t>(i);
    if (in_order_) index_.clear();
    index_.shrink_to_fit();
  }

  // Packed value of the i-th tap or, where dense, of tap i % taps() of output i / taps(); -1 is zero.
  int32_t Index(int64_t i) const { return in_order_ ? static_cast<int32_t>(i) : index_[i]; }
  bool in_order() const { return in_order_; }  // the packed values are those of the taps, output by output
  int64_t outputs() const { return outputs_; }
  int64_t taps() const { return static_cast<int64_t>(sources_.size()); }
  bool empty() const { return rows <= 0 || cols <= 0; }

  // A residual goes with passes that write every pixel.
  std::vector<Region> Regions(const LaneMap& in, const LaneMap& out, const LaneMap* residual = nullptr) const {
    std::vector<Region> regions;
    for (int64_t n = 0; n < out.batch && !empty(); ++n) {
      regions.push_back({rows, cols, out.At(n, 0, out_row, out_col), out.channel_stride, out_step * out.row_stride,
                         out_step * kVector, in.At(n, 0, in_row, in_col), in.channel_stride, in_step * in.row_stride,
                         in_step * kVector, nullptr, 0, 0});
      if (!residual) continue;
      regions.back().residual = residual->At(n, 0);
      regions.back().residual_channel = residual->channel_stride;
      regions.back().residual_row = residual->row_stride;
    }
    return regions;
  }

  std::shared_ptr<const BoundTaps> Bind(const LaneMap& in) const {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& taps = bound_[{in.channel_stride, in.row_stride}];
    if (!taps) taps = MakeBound(in);
    return taps;
  }

 private:
  void SetDense(const std::vector<std::vector<Tap>>& taps) {
    for (const auto& row : taps) {
      for (const Tap& tap : row) sources_.push_back(tap.source);
    }
    std::sort(sources_.begin(), sources_.end());
    sources_.erase(std::unique(sources_.begin(), sources_.end(),
                               [](const Source& a, const Source& b) { return !(a < b) && !(b < a); }),
                   sources_.end());
    index_.assign(outputs_ * sources_.size(), -1);
    for (int64_t o = 0; o < outputs_; ++o) {
      for (const Tap& tap : taps[o]) {
        const auto at = std::lower_bound(sources_.begin(), sources_.end(), tap.source) - sources_.begin();
        index_[o * sources_.size() + at] = tap.index;
      }
    }
  }

  // Rows and columns, relative to a position, between which the taps read.
  struct Window {
    int16_t low = 0, high = 0, left = 0, right = 0;
  };
  Window Reach() const {
    Window w;
    for (const Source& s : sources_) {
      w.low = std::min(w.low, s.row);
      w.high = std::max(w.high, s.row);
      w.left = std::min(w.left, s.col);
      w.right = std::max(w.right, s.col);
    }
    return w;
  }

  // Input vectors of one channel that an output tile reads.
  int64_t TileVectors(int64_t tile_rows) const {
    const Window w = Reach();
    const int64_t tile_cols = std::min(cols, Kernels<TapKernels>().tile_cols);
    tile_rows = std::min(rows, tile_rows);
    return ((tile_rows - 1) * in_step + 1 + w.high - w.low) * ((tile_cols - 1) * in_step + 1 + w.right - w.left);
  }

  // What a tile reads and its neighbours above and to the left do not: its lowest
  // rows and rightmost columns, of `channels` channels.
  std::vector<int32_t> Fresh(const LaneMap& in, int64_t channels, int64_t tile_rows) const {
    const Window w = Reach();
    const int64_t down = in_step * std::min(rows, tile_rows);
    const int64_t across = in_step * std::min(cols, Kernels<TapKernels>().tile_cols);
    std::vector<int32_t> lines;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t row = w.high - in_step + 1; row < w.high - in_step + 1 + down; ++row) {
        for (int64_t col = w.right - in_step + 1; col < w.right - in_step + 1 + across; ++col) {
          lines.push_back(static_cast<int32_t>(c * in.channel_stride + row * in.row_stride + col * kVector));
        }
      }
    }
    return lines;
  }

  // Ranges to cut the input channels into: few send few partial sums to memory, many
  // keep the tile of a range in the first cache level.
  int64_t Blocks(int64_t channels, int64_t tile_rows, double taps_per_output) const {
    const double bytes = static_cast<double>(TileVectors(tile_rows) * kVector * sizeof(float) * channels);
    const double level = static_cast<double>(Kernels<TapKernels>().first_level);
    int64_t best = 1;
    double least = 0;
    for (int64_t blocks = 1; blocks <= channels; ++blocks) {
      const double far = std::clamp((bytes / static_cast<double>(blocks) / level - 0.85) / 3.3, 0.0, 1.0);
      const double cost = kPartialSum * static_cast<double>(blocks) + kFarOperand * taps_per_output * far;
      if (blocks == 1 || cost < least) {
        best = blocks;
        least = cost;
      }
    }
    return best;
  }

  bool TwoRows(double taps_per_output) const {
    const double more = static_cast<double>(TileVectors(2)) / static_cast<double>(TileVectors(1)) - 1;
    return taps_per_output > two_rows * more;
  }

  std::shared_ptr<const BoundTaps> MakeBound(const LaneMap& in) const {
    auto bound = std::make_shared<BoundTaps>();
    for (const Source& s : sources_) {
      bound->offsets.push_back(
          static_cast<int32_t>(s.channel * in.channel_stride + s.row * in.row_stride + s.col * kVector));
    }
    if (dense) {
      bound->dense = {outputs_, taps(), bound->offsets.data()};
      return bound;
    }
    const double taps_per_output = static_cast<double>(taps()) / static_cast<double>(std::max<int64_t>(1, outputs_));
    const int64_t tile_rows = TwoRows(taps_per_output) ? Kernels<TapKernels>().tile_rows : 1;
    const int64_t per_block = CeilDiv(in.channels, Blocks(in.channels, tile_rows, taps_per_output));
    const int64_t blocks = CeilDiv(in.channels, per_block);
    OrderByBlock(per_block, blocks, bound.get());
    bound->fresh = Fresh(in, per_block, tile_rows);
    bound->sparse = {outputs_,
                     blocks,
                     tile_rows,
                     bound->starts.data(),
                     bound->offsets.data(),
                     bound->order.data(),
                     bound->fresh.data(),
                     static_cast<int64_t>(bound->fresh.size()),
                     per_block * in.channel_stride};
    return bound;
  }

  // Turns offsets by output into offsets by block and output, and fills starts and order.
  void OrderByBlock(int64_t per_block, int64_t blocks, BoundTaps* bound) const {
    std::vector<int32_t> next(outputs_), offsets;  // the first tap of each output that no block has taken
    for (int64_t o = 1; o < outputs_; ++o) next[o] = ends_[o - 1];
    offsets.reserve(sources_.size());
    bound->order.reserve(sources_.size());
    bound->starts.push_back(0);
    for (int64_t block = 1; block <= blocks; ++block) {
      for (int64_t o = 0; o < outputs_; ++o) {
        int32_t& t = next[o];
        for (; t < ends_[o] && sources_[t].channel < block * per_block; ++t) {
          offsets.push_back(bound->offsets[t]);
          bound->order.push_back(Index(t));
        }
        bound->starts.push_back(static_cast<int32_t>(offsets.size()));
      }
    }
    offsets.push_back(0);  // kernels look a tap ahead
    bound->offsets = std::move(offsets);
  }

  int64_t outputs_ = 0;
  std::vector<Source> sources_;
  std::vector<int32_t> index_, ends_;  // packed value of each tap, or of each (output, tap) where dense
  bool in_order_ = false;              // index_ is empty and would count from 0
  mutable std::mutex mutex_;
  mutable std::map<std::pair<int64_t, int64_t>, std::shared_ptr<const BoundTaps>> bound_;
};

struct Weight {
  int32_t out, in;  // channels of the whole layer, groups unfolded
  int32_t row, col;
};

const char* Name(ConvKernel kernel) {
  return kernel == ConvKernel::kSparse ? "sparse" : kernel == ConvKernel::kWinograd ? "winograd" : "dense";
}

// Dense weights as the kernels want them: [group of outputs][tap][output of the group],
// times the output's scale (null: 1).
void PackDense(const Pass& pass, const float* values, const float* scale, float* packed, int threads) {
  const int64_t taps = pass.taps(), outputs = pass.outputs();
  ParallelFor(threads, CeilDiv(outputs, kDenseGroup), [&](int64_t g) {
    const int64_t first = g * kDenseGroup;
    float* to = packed + first * taps;
    float factors[kDenseGroup] = {};
    for (int64_t k = 0; k < kDenseGroup && first + k < outputs; ++k) factors[k] = scale ? scale[first + k] : 1.0f;
    if (pass.in_order() && first + kDenseGroup <= outputs) {
      const float* rows = values + first * taps;
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t k = 0; k < kDenseGroup; ++k) to[t * kDenseGroup + k] = rows[k * taps + t] * factors[k];
      }
      return;
    }
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t k = 0; k < kDenseGroup; ++k) {
        const int32_t i = first + k < outputs ? pass.Index((first + k) * taps + t) : -1;
        to[t * kDenseGroup + k] = i < 0 ? 0.0f : values[i] * factors[k];
      }
    }
  });
}

// Values in the order of the taps, times the output's scale (null: 1).
void PackSparse(const Pass& pass, const TapList& taps, const float* values, const float* scale, float* packed,
                int threads) {
  constexpr int64_t kPerTask = 64;  // rows: an output's taps of a block
  const int64_t rows = taps.outputs * taps.blocks;
  ParallelFor(threads, CeilDiv(rows, kPerTask), [&](int64_t i) {
    const int64_t last = std::min((i + 1) * kPerTask, rows);
    for (int64_t row = i * kPerTask; row < last; ++row) {
      const float factor = scale ? scale[row % taps.outputs] : 1.0f;
      const int32_t first = taps.starts[row], count = taps.starts[row + 1] - first;
      float* to = packed + first;
      const int32_t* order = taps.order + first;
      if (pass.in_order() && count > 0) {  // an output's taps of a block are neighbours
        const float* from = values + *order;
        for (int32_t t = 0; t < count; ++t) to[t] = from[t] * factor;
      } else {
        for (int32_t t = 0; t < count; ++t) to[t] = values[order[t]] * factor;
      }
    }
  });
}

// Floats that the weights of a pass take in the kernels' form.
int64_t PackedFloats(const Pass& pass) {
  return pass.dense ? CeilDiv(pass.outputs(), kDenseGroup) * kDenseGroup * pass.taps() : pass.taps() + 1;
}

void Pack(const Pass& pass, const float* values, const float* scale, const LaneMap& in, float* packed, int threads) {
  if (pass.dense) {
    PackDense(pass, values, scale, packed, threads);
  } else {
    PackSparse(pass, pass.Bind(in)->sparse, values, scale, packed, threads);
  }
}

// out = end(pass over in, bias); the scale is in the packed weights already.
void Accumulate(const Pass& pass, const float* packed, const float* bias, const LaneMap& in, const LaneMap& out,
                const ConvEnd& end, int threads) {
  const std::vector<Region> regions = pass.Regions(in, out, end.residual);
  if (regions.empty()) return;
  const auto taps = pass.Bind(in);
  const TapKernels& kernels = Kernels<TapKernels>();
  const int64_t count = static_cast<int64_t>(regions.size());
  if (pass.dense) {
    kernels.dense_accumulate(regions.data(), count, taps->dense, packed, bias, end.act, threads);
  } else {
    kernels.sparse_accumulate(regions.data(), count, taps->sparse, packed, bias, end.act, threads);
  }
}

enum Side { kNoSide, kTop, kBottom, kLeft, kRight };  // of the picture

}  // namespace

struct Conv::Impl {
  ConvShape shape;
  ConvGeometry geometry;
  int64_t out_h, out_w;
  int64_t kept;
  std::vector<int32_t> weights;  // packed order -> position in the dense weight; empty where all are kept
  ConvKernel forward, input_gradient, weight_gradient;
  Pass forward_pass, weight_pass;
  bool shares_taps;                                    // weight_pass stays empty: forward_pass is the same
  std::vector<std::unique_ptr<Pass>> gradient_passes;  // of the input gradient; with Winograd, of the padding alone
  int64_t gradient_halo;
  int tile;            // of Winograd
  bool dense_borders;  // the padding's, where Winograd does the rest of the input gradient

  int64_t DenseWeightFloats() const { return shape.out_channels * shape.in_channels * 9; }
  bool dense() const { return kept == DenseWeightFloats(); }
  int32_t FlatIndex(int64_t packed) const { return weights.empty() ? static_cast<int32_t>(packed) : weights[packed]; }
  Weight WeightAt(int64_t packed) const;
  void Scatter(const float* values, float* dense, int threads) const;
  int64_t TransformedFloats() const {
    return RoundUp(WinogradWeightFloats(shape.out_channels, shape.in_channels, tile));
  }
  const WinogradKernels& Winograd() const {
    return shape.stride == 2 ? Kernels<StridedWinogradKernels>().kernels : Kernels<WinogradKernels>();
  }
  void Transform(bool transposed, const float* values, float* transformed, float* scratch, int threads) const;
  void AccumulateGradient(const Pass& pass, const float* values, const LaneMap& dy, const LaneMap& dx, float* scratch,
                          int threads) const;
  LaneMap Sketch(bool input) const;
  void CheckSizes();
  void ListWeights(const uint8_t* mask);
  // `taps`: false where Winograd runs, which needs none.
  void BuildForward(Pass* pass, bool taps, bool dense);
  void BuildInputGradient();
  // One phase of the input gradient, over position rows [row_from, row_to) and the
  // same of columns. Beyond a side of the picture the weights that reach back matter.
  void AddGradientPass(int64_t phase_row, int64_t phase_col, int64_t row_from, int64_t row_to, int64_t col_from,
                       int64_t col_to, Side beyond);
  int64_t ScratchFloats(int threads) const;
};

void Conv::Impl::CheckSizes() {
  const int64_t reach_h = shape.dilation * (shape.kernel_h - 1), reach_w = shape.dilation * (shape.kernel_w - 1);
  out_h = FloorDiv(geometry.height + 2 * shape.pad_h - reach_h - 1, shape.stride) + 1;
  out_w = FloorDiv(geometry.width + 2 * shape.pad_w - reach_w - 1, shape.stride) + 1;
  if (out_h < 1 || out_w < 1) {
    throw std::invalid_argument("conv: a picture of " + std::to_string(geometry.height) + " x " +
                                std::to_string(geometry.width) + " pixels is smaller than the kernel of " +
                                std::to_string(reach_h + 1) + " x " + std::to_string(reach_w + 1));
  }
  if (std::max({reach_h, reach_w, shape.pad_h, shape.pad_w}) > kFarthest) {
    throw std::invalid_argument("conv: kernel and padding may reach " + std::to_string(kFarthest) + " pixels");
  }
  if (geometry.in_block_h != shape.stride * geometry.out_block_h ||
      geometry.in_block_w != shape.stride * geometry.out_block_w || kGrid * geometry.out_block_h < out_h ||
      kGrid * geometry.out_block_w < out_w) {
    throw std::invalid_argument(
        "conv: input blocks must be stride times output blocks, and those must hold the output");
  }
}

void Conv::Impl::ListWeights(const uint8_t* mask) {
  const int64_t count = shape.out_channels * (shape.in_channels / shape.groups) * shape.kernel_h * shape.kernel_w;
  kept = mask ? std::count_if(mask, mask + count, [](uint8_t alive) { return alive != 0; }) : count;
  if (kept == count) return;
  weights.reserve(kept);
  for (int64_t flat = 0; flat < count; ++flat) {
    if (mask[flat]) weights.push_back(static_cast<int32_t>(flat));
  }
}

Weight Conv::Impl::WeightAt(int64_t packed) const {
  const int32_t flat = FlatIndex(packed);
  const int32_t group_in = static_cast<int32_t>(shape.in_channels / shape.groups);
  const int32_t group_out = static_cast<int32_t>(shape.out_channels / shape.groups);
  const int32_t kernel_w = static_cast<int32_t>(shape.kernel_w), kernel_h = static_cast<int32_t>(shape.kernel_h);
  const int32_t in = flat / (kernel_w * kernel_h) % group_in, out = flat / (kernel_w * kernel_h) / group_in;
  return {out, out / group_out * group_in + in, flat / kernel_w % kernel_h, flat % kernel_w};
}

void Conv::Impl::BuildForward(Pass* pass, bool needs_taps, bool dense) {
  pass->rows = geometry.out_block_h;
  pass->cols = geometry.out_block_w;
  pass->in_step = shape.stride;
  pass->dense = dense;
  if (!needs_taps) return;
  std::vector<std::vector<Tap>> taps(shape.out_channels);
  for (int64_t i = 0; i < kept; ++i) {
    const Weight w = WeightAt(i);
    taps[w.out].push_back({{w.in, static_cast<int16_t>(w.row * shape.dilation - shape.pad_h),
                            static_cast<int16_t>(w.col * shape.dilation - shape.pad_w)},
                           static_cast<int32_t>(i)});
  }
  pass->SetTaps(std::move(taps));
}

void Conv::Impl::AddGradientPass(int64_t phase_row, int64_t phase_col, int64_t row_from, int64_t row_to,
                                 int64_t col_from, int64_t col_to, Side beyond) {
  auto pass = std::make_unique<Pass>();
  pass->rows = row_to - row_from;
  pass->cols = col_to - col_from;
  if (pass->empty()) return;
  pass->out_row = shape.stride * row_from + phase_row;
  pass->out_col = shape.stride * col_from + phase_col;
  pass->in_row = row_from;
  pass->in_col = col_from;
  pass->out_step = shape.stride;
  pass->dense = input_gradient == ConvKernel::kDense || (input_gradient == ConvKernel::kWinograd && dense_borders);
  std::vector<std::vector<Tap>> taps(shape.in_channels);
  for (int64_t i = 0; i < kept; ++i) {
    const Weight w = WeightAt(i);
    const int64_t row = phase_row + shape.pad_h - w.row * shape.dilation;
    const int64_t col = phase_col + shape.pad_w - w.col * shape.dilation;
    if (FloorDiv(row, shape.stride) * shape.stride != row || FloorDiv(col, shape.stride) * shape.stride != col)
      continue;
    const int64_t shift_row = row / shape.stride, shift_col = col / shape.stride;
    if ((beyond == kTop && shift_row < 1) || (beyond == kBottom && shift_row > -1) ||
        (beyond == kLeft && shift_col < 1) || (beyond == kRight && shift_col > -1)) {
      continue;  // reads zeros
    }
    taps[w.in].push_back(
        {{w.out, static_cast<int16_t>(shift_row), static_cast<int16_t>(shift_col)}, static_cast<int32_t>(i)});
  }
  for (auto& row : taps) {
    std::sort(row.begin(), row.end(), [](const Tap& a, const Tap& b) { return a.source < b.source; });
  }
  pass->SetTaps(std::move(taps));
  gradient_passes.push_back(std::move(pass));
}

void Conv::Impl::BuildInputGradient() {
  const int64_t s = shape.stride, rows = geometry.out_block_h, cols = geometry.out_block_w;
  const bool pads = shape.padding != Padding::kZero;
  const int64_t pad_h = pads ? shape.pad_h : 0, pad_w = pads ? shape.pad_w : 0;
  for (int64_t r = 0; r < s; ++r) {
    for (int64_t c = 0; c < s; ++c) {
      // Positions whose pixel s * i + r lies in [-pad, block + pad).
      const int64_t row_from = CeilDiv(-pad_h - r, s), row_to = FloorDiv(s * rows + pad_h - 1 - r, s) + 1;
      const int64_t col_from = CeilDiv(-pad_w - c, s), col_to = FloorDiv(s * cols + pad_w - 1 - c, s) + 1;
      if (input_gradient != ConvKernel::kWinograd) {
        AddGradientPass(r, c, row_from, row_to, col_from, col_to, kNoSide);
        continue;
      }
      AddGradientPass(r, c, row_from, 0, col_from, col_to, kTop);
      AddGradientPass(r, c, rows, row_to, col_from, col_to, kBottom);
      AddGradientPass(r, c, 0, rows, col_from, 0, kLeft);
      AddGradientPass(r, c, 0, rows, cols, col_to, kRight);
    }
  }
  const int64_t reach = shape.dilation * (std::max(shape.kernel_h, shape.kernel_w) - 1);
  const int64_t pad = std::max(shape.pad_h, shape.pad_w), most = std::max(pad_h, pad_w);
  const int64_t before = CeilDiv(reach - std::min(shape.pad_h, shape.pad_w) + most, s), after = CeilDiv(pad + most, s);
  gradient_halo = std::max<int64_t>(0, std::max(before, after));
}

// A map with the layer's sizes and no memory, for asking how much scratch it takes.
LaneMap Conv::Impl::Sketch(bool input) const {
  LaneMap map = {};
  map.batch = geometry.batch;
  map.channels = input ? shape.in_channels : shape.out_channels;
  map.height = input ? geometry.height : out_h;
  map.width = input ? geometry.width : out_w;
  map.block_h = input ? geometry.in_block_h : geometry.out_block_h;
  map.block_w = input ? geometry.in_block_w : geometry.out_block_w;
  return map;
}

int64_t Conv::Impl::ScratchFloats(int threads) const {
  const auto whole_groups = [](int64_t channels) { return CeilDiv(channels, kDenseGroup) * kDenseGroup; };
  const int64_t dense =
      whole_groups(shape.out_channels) * whole_groups(shape.in_channels) * shape.kernel_h * shape.kernel_w;
  int64_t most = std::max(dense, kept);
  if (weight_gradient == ConvKernel::kSparse) {
    most = std::max(most, 16 * DotFloats(kept, shape.out_channels));  // see sparse_dot_chunks
  }
  if (weight_gradient == ConvKernel::kDense) {
    most = std::max(most, 8 * DotFloats(dense, whole_groups(shape.out_channels)));  // see dense_dot_chunks
  }
  const WinogradKernels& winograd = Winograd();
  const LaneMap x = Sketch(true), y = Sketch(false);
  const int64_t weight_floats = RoundUp(DenseWeightFloats());
  if (forward == ConvKernel::kWinograd) {
    const int64_t rest = std::max(weight_floats, winograd.forward_scratch(x, y, tile, threads));
    most = std::max(most, TransformedFloats() + rest);
  }
  if (input_gradient == ConvKernel::kWinograd) {
    const int64_t rest = std::max(weight_floats, winograd.input_gradient_scratch(y, x, tile, threads));
    most = std::max(most, TransformedFloats() + rest);
  }
  if (weight_gradient == ConvKernel::kWinograd) {
    most = std::max(most, weight_floats + winograd.weight_gradient_scratch(x, y, tile, threads));
  }
  return most + kVector;
}

// Packed values to w[out][in][3][3].
void Conv::Impl::Scatter(const float* values, float* dense, int threads) const {
  ForRanges(threads, DenseWeightFloats(), [&](int64_t i, int64_t last) { std::fill(dense + i, dense + last, 0.0f); });
  ForRanges(threads, kept, [&](int64_t i, int64_t last) {
    for (; i < last; ++i) dense[FlatIndex(i)] = values[i];
  });
}

// All frequencies of all filters.
void Conv::Impl::Transform(bool transposed, const float* values, float* transformed, float* scratch,
                           int threads) const {
  if (!dense()) {
    Scatter(values, scratch, threads);
    values = scratch;
  }
  // The packed order of a dense layer is w[out][in][3][3] itself.
  Winograd().transform_weights(values, shape.out_channels, shape.in_channels, transposed, tile, transformed, threads);
}

void Conv::Impl::AccumulateGradient(const Pass& pass, const float* values, const LaneMap& dy, const LaneMap& dx,
                                    float* scratch, int threads) const {
  Pack(pass, values, nullptr, dy, scratch, threads);
  Accumulate(pass, scratch, nullptr, dy, dx, {}, threads);
}

Conv::Conv(const ConvShape& shape, const ConvGeometry& geometry, const uint8_t* mask, ConvKernel asked, bool exact)
    : impl_(std::make_unique<Impl>()) {
  Impl& m = *impl_;
  m.shape = shape;
  m.geometry = geometry;
  m.CheckSizes();
  m.ListWeights(mask);
  const auto choose = [&](ConvDirection direction, bool direct) {
    return ChooseKernel(asked, shape, geometry, m.kept, direction, direct);
  };
  m.forward = choose(ConvDirection::kForward, exact);
  m.input_gradient = choose(ConvDirection::kInputGradient, exact);
  m.weight_gradient = choose(ConvDirection::kWeightGradient, exact);
  m.dense_borders = choose(ConvDirection::kInputGradient, true) == ConvKernel::kDense;
  m.tile = WinogradTile(geometry.out_block_h, geometry.out_block_w, shape.stride);
  m.BuildForward(&m.forward_pass, m.forward != ConvKernel::kWinograd, m.forward == ConvKernel::kDense);
  m.weight_pass.two_rows = kTwoRowsOfGradient;
  // Two sparse passes differ only where tiles may have one row or two.
  const bool alike = m.forward == ConvKernel::kDense || Kernels<TapKernels>().tile_rows == 1;
  m.shares_taps = m.forward == m.weight_gradient && m.forward != ConvKernel::kWinograd && alike;
  const bool dense = m.weight_gradient == ConvKernel::kDense;
  m.BuildForward(&m.weight_pass, m.weight_gradient != ConvKernel::kWinograd && !m.shares_taps, dense);
  m.BuildInputGradient();
}

Conv::~Conv() = default;

int64_t Conv::kept() const { return impl_->kept; }
int64_t Conv::out_height() const { return impl_->out_h; }
int64_t Conv::out_width() const { return impl_->out_w; }
int64_t Conv::scratch_floats(int threads) const { return impl_->ScratchFloats(threads); }
int64_t Conv::gradient_halo() const { return impl_->gradient_halo; }
const char* Conv::forward_kernel() const { return Name(impl_->forward); }
const char* Conv::input_gradient_kernel() const { return Name(impl_->input_gradient); }
const char* Conv::weight_gradient_kernel() const { return Name(impl_->weight_gradient); }

int64_t Conv::prepared_floats() const {
  return impl_->forward == ConvKernel::kWinograd ? impl_->TransformedFloats() : PackedFloats(impl_->forward_pass);
}

void Conv::Prepare(const float* values, const LaneMap& x, float* prepared, float* scratch, int threads,
                   const ConvEnd& end) const {
  if (impl_->forward == ConvKernel::kWinograd) {
    impl_->Transform(false, values, prepared, scratch, threads);
  } else {
    Pack(impl_->forward_pass, values, end.scale, x, prepared, threads);
  }
}

void Conv::ForwardPrepared(const float* prepared, const float* bias, const LaneMap& x, const LaneMap& y, float* scratch,
                           int threads, const ConvEnd& end) const {
  if (impl_->forward == ConvKernel::kWinograd) {
    impl_->Winograd().forward(x, prepared, bias, y, end, impl_->tile, scratch, threads);
  } else {
    Accumulate(impl_->forward_pass, prepared, bias, x, y, end, threads);
  }
}

void Conv::Forward(const float* values, const float* bias, const LaneMap& x, const LaneMap& y, float* scratch,
                   int threads, const ConvEnd& end) const {
  float* rest = scratch + RoundUp(prepared_floats());
  Prepare(values, x, scratch, rest, threads, end);
  ForwardPrepared(scratch, bias, x, y, rest, threads, end);
}

void Conv::InputGradient(const float* values, const LaneMap& dy, const LaneMap& dx, float* scratch, int threads) const {
  const Impl& m = *impl_;
  if (m.input_gradient == ConvKernel::kWinograd) {
    float* rest = scratch + m.TransformedFloats();
    m.Transform(true, values, scratch, rest, threads);
    m.Winograd().input_gradient(dy, scratch, nullptr, dx, {}, m.tile, rest, threads);
  }
  for (const auto& pass : m.gradient_passes) m.AccumulateGradient(*pass, values, dy, dx, scratch, threads);
  const int64_t pad = std::max(m.shape.pad_h, m.shape.pad_w);
  if (m.shape.padding != Padding::kZero && pad > 0) {
    Kernels<LaneKernels>().fold_halo(dx, m.shape.padding, pad, threads);
  }
}

void Conv::WeightGradient(const LaneMap& x, const LaneMap& dy, float* dvalues, float* dbias, float* scratch,
                          int threads) const {
  const Impl& m = *impl_;
  const TapKernels& kernels = Kernels<TapKernels>();
  const Pass& pass = m.shares_taps ? m.forward_pass : m.weight_pass;
  const std::vector<Region> regions = pass.Regions(x, dy);
  const int64_t count = static_cast<int64_t>(regions.size());
  if (m.weight_gradient == ConvKernel::kSparse) {
    kernels.sparse_dot(regions.data(), count, pass.Bind(x)->sparse, scratch, dvalues, dbias, threads);
    return;
  }
  if (m.weight_gradient == ConvKernel::kDense) {
    kernels.dense_dot(regions.data(), count, pass.Bind(x)->dense, scratch, dbias, threads);
    ForRanges(threads, pass.outputs() * pass.taps(), [&](int64_t i, int64_t last) {
      for (; i < last; ++i) {
        const int32_t to = pass.Index(i);  // -1 where pruned
        if (to >= 0) dvalues[to] = scratch[i];
      }
    });
    return;
  }
  if (dbias) kernels.channel_sums(regions.data(), count, m.shape.out_channels, dbias, threads);
  float* rest = m.dense() ? scratch : scratch + RoundUp(m.DenseWeightFloats());
  m.Winograd().weight_gradient(x, dy, m.dense() ? dvalues : scratch, m.tile, rest, threads);
  if (m.dense()) return;
  ForRanges(threads, m.kept, [&](int64_t i, int64_t last) {
    for (; i < last; ++i) dvalues[i] = scratch[m.FlatIndex(i)];
  });
}

}  // namespace lipfast
