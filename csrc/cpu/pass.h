// One visit of a map by a direct kernel: a list of taps, packed weights for it, and the call. What conv.cc and
// border.cc are made of.
#pragma once

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/pool.h"
#include "cpu/taps.h"

namespace lipfast {

constexpr int64_t kVector = kGrid * kGrid;

// What the sparse kernels' time is made of, in units of one multiply-add of a vector
// whose operand is in the first cache level (docs/kernels.md, "Tiles").
constexpr double kPartialSum = 3.0;  // a vector of sums that goes to memory and back
constexpr double kFarOperand = 0.9;  // what an operand from the second level adds
// Tiles of two full rows save loads of weights but fill the first level sooner. They
// pay from this many taps of an output, times the share of input that the row adds;
// sooner in weight gradients, whose sums never go to memory.
constexpr double kTwoRows = 300, kTwoRowsOfGradient = 50;

inline int64_t FloorDiv(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int64_t CeilDiv(int64_t a, int64_t b) { return FloorDiv(a + b - 1, b); }
inline int64_t RoundUp(int64_t floats) { return CeilDiv(floats, kVector) * kVector; }  // keeps what follows aligned

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
      size_t count = 0;
      for (const auto& row : taps) count += row.size();
      sources_.reserve(count);
      index_.reserve(count);
      for (const auto& row : taps) {
        for (const Tap& tap : row) NotePlace(tap.source);
        one_channel_ = one_channel_ && (row.empty() || row.front().source.channel == row.back().source.channel);
      }
      for (const auto& row : taps) {
        for (const Tap& tap : row) {
          sources_.push_back(Encode(tap.source));
          index_.push_back(tap.index);
        }
        ends_.push_back(static_cast<int32_t>(sources_.size()));
      }
    }
    sources_.shrink_to_fit();
    count_ = static_cast<int64_t>(sources_.size());
    // Where all kept weights come in their own order, as they do forward, no list is needed.
    in_order_ = true;
    for (size_t i = 0; i < index_.size(); ++i) in_order_ = in_order_ && index_[i] == static_cast<int32_t>(i);
    if (in_order_) index_.clear();
    index_.shrink_to_fit();
  }

  // Packed value of the i-th tap or, where dense, of tap i % taps() of output i / taps(); -1 is zero.
  int32_t Index(int64_t i) const { return in_order_ ? static_cast<int32_t>(i) : index_[i]; }
  const int32_t* indices() const { return index_.data(); }  // unless in order
  bool complete() const { return complete_; }               // no index is -1
  bool in_order() const { return in_order_; }               // the packed values are those of the taps, output by output
  // Whether tiles, and so the list of taps, would be the same with another `two_rows`.
  bool SameTiles(double other) const { return TileRows(two_rows) == TileRows(other); }
  int64_t outputs() const { return outputs_; }
  int64_t taps() const { return count_; }
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
    const Strides strides = {in.channel_stride, in.row_stride};
    const auto found = bound_.find(strides);
    if (found != bound_.end()) return found->second;
    if (sources_.empty()) FindSources();
    const auto& taps = bound_[strides] = MakeBound(in);
    if (Decodable(strides)) ForgetSources();
    return taps;
  }

 private:
  using Strides = std::pair<int64_t, int64_t>;  // of channels and rows

  // The sources of all outputs together: mostly those of the first.
  void SetDense(const std::vector<std::vector<Tap>>& taps) {
    std::vector<Source> all, row, both;
    for (const auto& output : taps) {
      row.clear();
      for (const Tap& tap : output) row.push_back(tap.source);
      if (std::includes(all.begin(), all.end(), row.begin(), row.end())) continue;
      both.clear();
      std::set_union(all.begin(), all.end(), row.begin(), row.end(), std::back_inserter(both));
      all.swap(both);
    }
    for (const Source& source : all) NotePlace(source);
    for (const Source& source : all) sources_.push_back(Encode(source));
    index_.assign(outputs_ * all.size(), -1);
    complete_ = true;
    for (int64_t o = 0; o < outputs_; ++o) {
      complete_ = complete_ && taps[o].size() == all.size();
      size_t at = 0;
      for (const Tap& tap : taps[o]) {
        while (all[at] < tap.source) ++at;
        index_[o * all.size() + at] = tap.index;
      }
    }
  }

  // Sources are kept as channel * number of places + place: half the memory, in the same order.
  struct Place {
    int16_t row, col;
    bool operator<(const Place& b) const { return std::tie(row, col) < std::tie(b.row, b.col); }
  };
  std::vector<Place>::const_iterator FirstFrom(const Place& place) const {
    return std::lower_bound(places_.begin(), places_.end(), place);
  }
  void NotePlace(const Source& source) {
    const Place place = {source.row, source.col};
    const auto at = FirstFrom(place);
    if (at == places_.end() || place < *at) places_.insert(at, place);
  }
  int32_t Encode(const Source& source) const {
    return static_cast<int32_t>(source.channel * places_.size() +
                                (FirstFrom({source.row, source.col}) - places_.begin()));
  }

  // Rows and columns, relative to a position, between which the taps read.
  struct Window {
    int16_t low = 0, high = 0, left = 0, right = 0;
  };
  Window Reach() const {
    Window w;
    for (const Place& p : places_) {
      w.low = std::min(w.low, p.row);
      w.high = std::max(w.high, p.row);
      w.left = std::min(w.left, p.col);
      w.right = std::max(w.right, p.col);
    }
    return w;
  }

  // Columns of a sparse kernel's tile: rows are cut into equal parts.
  int64_t TileCols() const {
    const int64_t parts = CeilDiv(cols, Kernels<TapKernels>().tile_cols);
    return CeilDiv(cols, std::max<int64_t>(1, parts));
  }

  // Input vectors of one channel that an output tile reads.
  int64_t TileVectors(int64_t tile_rows) const {
    const Window w = Reach();
    return ((tile_rows - 1) * in_step + 1 + w.high - w.low) * ((TileCols() - 1) * in_step + 1 + w.right - w.left);
  }

  // What a tile reads and its neighbours above and to the left do not: its lowest
  // rows and rightmost columns, of `channels` channels.
  std::vector<int32_t> Fresh(const LaneMap& in, int64_t channels, int64_t tile_rows) const {
    const Window w = Reach();
    const int64_t down = in_step * tile_rows;
    const int64_t across = in_step * TileCols();
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
  int64_t Blocks(int64_t channels, int64_t tile_rows) const {
    const double bytes = static_cast<double>(TileVectors(tile_rows) * kVector * sizeof(float) * channels);
    const double level = static_cast<double>(FirstLevelBytes()), taps_per_output = TapsPerOutput();
    if (one_channel_) return 1;
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

  double TapsPerOutput() const {
    return static_cast<double>(taps()) / static_cast<double>(std::max<int64_t>(1, outputs_));
  }

  // `least`: taps that pay for a second row of full width.
  int64_t TileRows(double least) const {
    const TapKernels& kernels = Kernels<TapKernels>();
    if (rows < 2 || 2 * TileCols() > kernels.tile_vectors) return 1;
    if (2 * kernels.tile_cols > kernels.tile_vectors) return 2;  // one short row would leave half the registers empty
    const double more = static_cast<double>(TileVectors(2)) / static_cast<double>(TileVectors(1)) - 1;
    return TapsPerOutput() > least * more ? 2 : 1;
  }

  int64_t OffsetOf(const Place& p, const Strides& strides) const { return p.row * strides.second + p.col * kVector; }

  // Whether offsets tell channels and places apart: what is read of a channel lies within a plane, and of a row
  // within a row.
  bool Decodable(const Strides& strides) const {
    const Window w = Reach();
    const int64_t width = (w.right - w.left) * kVector, height = (w.high - w.low) * strides.second;
    return !dense && width < strides.second && height + width < strides.first;
  }

  // Sources and indices are in the bound lists as well, so that a pass that is bound once, as nearly all are, takes
  // half the memory.
  void ForgetSources() const {
    std::vector<int32_t>().swap(sources_);
    std::vector<int32_t>().swap(index_);
  }

  // What ForgetSources dropped, from lists that it was dropped for.
  void FindSources() const {
    const auto found =
        std::find_if(bound_.begin(), bound_.end(), [this](const auto& entry) { return Decodable(entry.first); });
    if (found == bound_.end()) return;  // there are none
    const Strides& strides = found->first;
    const BoundTaps& bound = *found->second;
    std::map<int64_t, int32_t> numbers;  // of places, by offset
    for (size_t i = 0; i < places_.size(); ++i) numbers[OffsetOf(places_[i], strides)] = static_cast<int32_t>(i);
    const int64_t low = numbers.begin()->first, places = static_cast<int64_t>(places_.size());
    for (int64_t o = 0; o < outputs_; ++o) {
      for (int64_t block = 0; block < bound.sparse.blocks; ++block) {
        const int32_t* start = bound.starts.data() + block * outputs_ + o;
        for (int32_t t = start[0]; t < start[1]; ++t) {
          const int64_t channel = FloorDiv(bound.offsets[t] - low, strides.first);
          const int32_t place = numbers.at(bound.offsets[t] - channel * strides.first);
          sources_.push_back(static_cast<int32_t>(channel * places + place));
          if (!in_order_) index_.push_back(bound.order[t]);
        }
      }
    }
  }

  std::shared_ptr<const BoundTaps> MakeBound(const LaneMap& in) const {
    auto bound = std::make_shared<BoundTaps>();
    const int32_t places = static_cast<int32_t>(places_.size());
    bound->offsets.reserve(sources_.size());
    for (int32_t source : sources_) {
      const Place& p = places_[source % places];
      bound->offsets.push_back(
          static_cast<int32_t>(source / places * in.channel_stride + p.row * in.row_stride + p.col * kVector));
    }
    if (dense) {
      bound->dense = {outputs_, taps(), bound->offsets.data()};
      return bound;
    }
    const int64_t tile_rows = TileRows(two_rows);
    const int64_t per_block = CeilDiv(in.channels, Blocks(in.channels, tile_rows));
    const int64_t blocks = CeilDiv(in.channels, per_block);
    OrderByBlock(per_block, blocks, bound.get());
    bound->fresh = Fresh(in, per_block, tile_rows);
    bound->sparse = {outputs_,
                     blocks,
                     tile_rows,
                     bound->starts.data(),
                     bound->offsets.data(),
                     bound->order.data(),
                     places_.size() > 1,
                     bound->fresh.data(),
                     static_cast<int64_t>(bound->fresh.size()),
                     per_block * in.channel_stride};
    return bound;
  }

  // Turns offsets by output into offsets by block and output, and fills starts and order.
  void OrderByBlock(int64_t per_block, int64_t blocks, BoundTaps* bound) const {
    std::vector<int32_t> next(outputs_), offsets;  // the first tap of each output that no block has taken
    for (int64_t o = 1; o < outputs_; ++o) next[o] = ends_[o - 1];
    const int64_t places = static_cast<int64_t>(places_.size());
    offsets.reserve(sources_.size() + kTapsAhead);
    bound->order.reserve(sources_.size());
    bound->starts.push_back(0);
    for (int64_t block = 1; block <= blocks; ++block) {
      for (int64_t o = 0; o < outputs_; ++o) {
        int32_t& t = next[o];
        for (; t < ends_[o] && sources_[t] < block * per_block * places; ++t) {
          offsets.push_back(bound->offsets[t]);
          bound->order.push_back(Index(t));
        }
        bound->starts.push_back(static_cast<int32_t>(offsets.size()));
      }
    }
    offsets.insert(offsets.end(), kTapsAhead, 0);
    bound->offsets = std::move(offsets);
  }

  int64_t outputs_ = 0;
  int64_t count_ = 0;                     // of taps
  mutable std::vector<int32_t> sources_;  // encoded; empty while ForgetSources holds
  std::vector<Place> places_;             // that any tap reads, ascending
  mutable std::vector<int32_t> index_;    // packed value of each tap, or of each (output, tap) where dense; likewise
  std::vector<int32_t> ends_;             // of each output's taps
  bool one_channel_ = true;               // no output reads two
  bool complete_ = false;                 // dense: every output has every tap
  bool in_order_ = false;                 // index_ is empty and would count from 0
  mutable std::mutex mutex_;
  mutable std::map<Strides, std::shared_ptr<const BoundTaps>> bound_;
};

// Dense weights as the kernels want them: [group of outputs][tap][output of the group],
// times the output's scale (null: 1).
template <int64_t kGroup>
void PackDenseBy(const Pass& pass, const float* values, const float* scale, float* packed, int threads) {
  const int64_t taps = pass.taps(), outputs = pass.outputs();
  ParallelFor(threads, CeilDiv(outputs, kGroup), [&](int64_t g) {
    const int64_t first = g * kGroup;
    float* to = packed + first * taps;
    float factors[kGroup] = {};
    for (int64_t k = 0; k < kGroup && first + k < outputs; ++k) factors[k] = scale ? scale[first + k] : 1.0f;
    if (pass.in_order() && first + kGroup <= outputs) {
      const float* rows = values + first * taps;
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t k = 0; k < kGroup; ++k) to[t * kGroup + k] = rows[k * taps + t] * factors[k];
      }
      return;
    }
    if (pass.complete() && first + kGroup <= outputs) {
      const int32_t* rows = pass.indices() + first * taps;
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t k = 0; k < kGroup; ++k) to[t * kGroup + k] = values[rows[k * taps + t]] * factors[k];
      }
      return;
    }
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t k = 0; k < kGroup; ++k) {
        const int32_t i = first + k < outputs ? pass.Index((first + k) * taps + t) : -1;
        to[t * kGroup + k] = i < 0 ? 0.0f : values[i] * factors[k];
      }
    }
  });
}

inline void PackDense(const Pass& pass, const float* values, const float* scale, float* packed, int threads) {
  const auto pack = Kernels<TapKernels>().dense_group == 6 ? PackDenseBy<6> : PackDenseBy<4>;
  pack(pass, values, scale, packed, threads);
}

// Values in the order of the taps, times the output's scale (null: 1).
inline void PackSparse(const Pass& pass, const TapList& taps, const float* values, const float* scale, float* packed,
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
inline int64_t PackedFloats(const Pass& pass) {
  const int64_t group = Kernels<TapKernels>().dense_group;
  return pass.dense ? CeilDiv(pass.outputs(), group) * group * pass.taps() : pass.taps() + 1;
}

inline void Pack(const Pass& pass, const float* values, const float* scale, const LaneMap& in, float* packed,
                 int threads) {
  if (pass.dense) {
    PackDense(pass, values, scale, packed, threads);
  } else {
    PackSparse(pass, pass.Bind(in)->sparse, values, scale, packed, threads);
  }
}

// out = end(pass over in, bias); the scale is in the packed weights already. Of halos only zero padding is filled.
inline void Accumulate(const Pass& pass, const float* packed, const float* bias, const LaneMap& in, const LaneMap& out,
                       const ConvEnd& end, int threads) {
  const std::vector<Region> regions = pass.Regions(in, out, end.residual);
  if (regions.empty()) return;
  const auto taps = pass.Bind(in);
  const TapKernels& kernels = Kernels<TapKernels>();
  const int64_t count = static_cast<int64_t>(regions.size());
  const TapEnd stored = {end.act, end.halo.fill ? out.halo : 0, out.height, out.width, out.grid};
  if (pass.dense) {
    kernels.dense_accumulate(regions.data(), count, taps->dense, packed, bias, stored, threads);
  } else {
    kernels.sparse_accumulate(regions.data(), count, taps->sparse, packed, bias, stored, threads);
  }
}

}  // namespace lipfast
