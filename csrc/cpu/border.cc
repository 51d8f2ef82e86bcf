#include "cpu/border.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cpu/pool.h"

namespace lipfast {
namespace {

constexpr int64_t kPlanesPerTask = 16;

// Pixels of the padded input that a strip covers: rows [top, bottom), columns [left, right).
struct Rectangle {
  int64_t top, bottom, left, right;
};

// Floats from a picture's pixel (0, 0) to pixel (row, col).
int64_t PixelOffset(int64_t row, int64_t col, const Axis& rows, const Axis& cols, int64_t row_stride) {
  const int64_t lane = row / rows.block * cols.grid + col / cols.block;
  return row % rows.block * row_stride + col % cols.block * kVector + lane;
}

}  // namespace

int64_t OutSide(int64_t side, int64_t pad, int64_t kernel, const ConvShape& shape) {
  return FloorDiv(side + 2 * pad - shape.dilation * (kernel - 1) - 1, shape.stride) + 1;
}

std::vector<Reading> GradientReadings(const ConvShape& shape, int64_t phase_row, int64_t phase_col) {
  const int64_t s = shape.stride;
  std::vector<Reading> readings;
  for (int64_t place = shape.kernel_h * shape.kernel_w - 1; place >= 0; --place) {
    const int64_t row = phase_row + shape.pad_h - place / shape.kernel_w * shape.dilation;
    const int64_t col = phase_col + shape.pad_w - place % shape.kernel_w * shape.dilation;
    if (row % s != 0 || col % s != 0) continue;
    readings.push_back({static_cast<int32_t>(place), static_cast<int16_t>(row / s), static_cast<int16_t>(col / s)});
  }
  return readings;
}

std::vector<std::vector<Tap>> GradientTaps(const ConvShape& shape, const std::vector<Weight>& weights,
                                           const std::vector<Reading>& readings) {
  const int64_t places = shape.kernel_h * shape.kernel_w;
  std::vector<std::vector<Tap>> taps(shape.in_channels);
  const size_t expected = weights.size() * readings.size() / (places * shape.in_channels);
  for (auto& row : taps) row.reserve(expected + expected / 8);
  std::vector<int32_t> packed(places, -1);  // of one filter
  for (size_t i = 0, end; i < weights.size(); i = end) {
    const auto [out, in, first] = weights[i];
    for (end = i; end < weights.size() && weights[end].out == out && weights[end].in == in; ++end) {
      packed[weights[end].place] = static_cast<int32_t>(end);
    }
    for (const Reading& reading : readings) {
      const int32_t index = packed[reading.place];
      if (index >= 0) taps[in].push_back({{out, reading.row, reading.col}, index});
    }
    std::fill(packed.begin() + first, packed.end(), -1);
  }
  return taps;
}

namespace {

// One channel of one picture; they are counted picture by picture.
float* Plane(const LaneMap& map, int64_t plane) {
  const int64_t picture = plane / map.channels;
  const int64_t lane = LaneAt(picture % map.sheet(), 0, 0, map.grid);
  return map.At(picture / map.sheet(), plane % map.channels) + lane;
}

// body(first, last) for ranges of planes.
template <class Body>
void ForPlanes(const LaneMap& map, int threads, const Body& body) {
  const int64_t planes = map.pictures() * map.channels;
  ParallelFor(threads, CeilDiv(planes, kPlanesPerTask),
              [&](int64_t task) { body(task * kPlanesPerTask, std::min((task + 1) * kPlanesPerTask, planes)); });
}

}  // namespace

// One phase of the stride in one rectangle. Positions count pixels of dx that are the stride apart,
// and pixels of dy one apart; "across" runs over the few of them, "along" over the many.
class Border::Strip {
 public:
  Strip(const ConvShape& shape, const ConvGeometry& geometry, const Rectangle& r, bool turned, int64_t phase_row,
        int64_t phase_col)
      : shape_(shape), turned_(turned), phase_row_(phase_row), phase_col_(phase_col) {
    const int64_t s = shape.stride;
    const auto span = [s](int64_t from, int64_t to, int64_t phase) {
      return std::pair<int64_t, int64_t>{CeilDiv(from - phase, s), FloorDiv(to - 1 - phase, s) + 1};
    };
    auto [row_from, row_to] = span(r.top, r.bottom, phase_row);
    auto [col_from, col_to] = span(r.left, r.right, phase_col);
    if (turned) {
      std::swap(row_from, col_from);
      std::swap(row_to, col_to);
    }
    across_ = row_from;
    along_ = col_from;
    length_ = col_to - col_from;
    pass_.rows = row_to - row_from;
    pass_.cols = CeilDiv(length_, kVector);
    in_rows_ = {geometry.grid, geometry.in_block_h, geometry.height};
    in_cols_ = {geometry.grid, geometry.in_block_w, geometry.width};
    out_rows_ = {geometry.grid, geometry.out_block_h, OutSide(geometry.height, shape.pad_h, shape.kernel_h, shape)};
    out_cols_ = {geometry.grid, geometry.out_block_w, OutSide(geometry.width, shape.pad_w, shape.kernel_w, shape)};
  }

  bool empty() const { return pass_.empty() || pass_.taps() == 0; }

  void SetTaps(const std::vector<Weight>& weights, bool dense) {
    if (pass_.empty()) return;
    std::vector<Reading> readings;
    for (Reading reading : GradientReadings(shape_, phase_row_, phase_col_)) {
      if (turned_) std::swap(reading.row, reading.col);
      if (ReadsZeros(reading)) continue;
      if (readings.empty()) {
        low_row_ = high_row_ = reading.row;
        low_col_ = high_col_ = reading.col;
      }
      low_row_ = std::min<int64_t>(low_row_, reading.row);
      high_row_ = std::max<int64_t>(high_row_, reading.row);
      low_col_ = std::min<int64_t>(low_col_, reading.col);
      high_col_ = std::max<int64_t>(high_col_, reading.col);
      readings.push_back(reading);
    }
    std::sort(readings.begin(), readings.end(),
              [](const Reading& a, const Reading& b) { return std::tie(a.row, a.col) < std::tie(b.row, b.col); });
    pass_.dense = dense;
    pass_.SetTaps(GradientTaps(shape_, weights, readings));
  }

  int64_t ScratchFloats(int64_t pictures) const {
    return PackedAligned() + pictures * (shape_.out_channels * InFloats() + shape_.in_channels * OutFloats());
  }

  // The strip's gradients, into `scratch`.
  void Compute(const float* values, const LaneMap& dy, const LaneMap& dx, float* scratch, int threads) const {
    const LaneMap in = Map(scratch + PackedAligned(), dy, InRows(), InCols(), -low_row_ * InCols() - low_col_);
    const auto offsets = OffsetsFor(dy.row_stride, dx.row_stride);
    ForPlanes(dy, threads, [&](int64_t first, int64_t last) {
      for (int64_t plane = first; plane < last; ++plane) {
        const float* from = Plane(dy, plane);
        float* to = Plane(in, plane) + (low_row_ * InCols() + low_col_) * kVector;
        if (plane + 1 < last) Fetch(Plane(dy, plane + 1), offsets->gather_lines);
        for (size_t i = 0; i < offsets->gather.size(); ++i) {
          const int32_t at = offsets->gather[i];
          to[i] = at < 0 ? 0.0f : from[at];
        }
      }
    });
    Pack(pass_, values, nullptr, in, scratch, threads);
    Accumulate(pass_, scratch, nullptr, in, Result(dx, scratch), {}, threads);
  }

  // Adds what Compute left in `scratch` to planes [first, last) of dx.
  void AddTo(const LaneMap& dy, const LaneMap& dx, float* scratch, int64_t first, int64_t last) const {
    const auto offsets = OffsetsFor(dy.row_stride, dx.row_stride);
    const LaneMap result = Result(dx, scratch);
    for (int64_t plane = first; plane < last; ++plane) {
      const float* from = Plane(result, plane);
      float* to = Plane(dx, plane);
      if (plane + 1 < last) Fetch(Plane(dx, plane + 1), offsets->scatter_lines);
      for (size_t i = 0; i < offsets->scatter.size(); ++i) {
        const int32_t at = offsets->scatter[i];
        if (at >= 0) to[at] += from[i];
      }
    }
  }

 private:
  // For each float of a strip the pixel that it comes from or goes to, -1 for none.
  struct Offsets {
    std::vector<int32_t> gather, scatter;
    std::vector<int32_t> gather_lines, scatter_lines;  // the vectors that they lie in
  };

  // The vectors that some offsets lie in, each once.
  static std::vector<int32_t> Lines(const std::vector<int32_t>& offsets) {
    std::vector<int32_t> lines;
    for (int32_t at : offsets) {
      if (at >= 0) lines.push_back(at / static_cast<int32_t>(kVector) * static_cast<int32_t>(kVector));
    }
    std::sort(lines.begin(), lines.end());
    lines.erase(std::unique(lines.begin(), lines.end()), lines.end());
    return lines;
  }

  // Brings a plane's vectors near: they lie in as many pages, where no hardware fetches ahead.
  static void Fetch(const float* plane, const std::vector<int32_t>& lines) {
    for (int32_t at : lines) __builtin_prefetch(plane + at, 0, 3);
  }

  // Whether no position's source lies in the gradient.
  bool ReadsZeros(const Reading& reading) const {
    const int64_t out_across = (turned_ ? out_cols_ : out_rows_).side;
    return across_ + pass_.rows + reading.row <= 0 || across_ + reading.row >= out_across;
  }

  int64_t InRows() const { return pass_.rows + high_row_ - low_row_; }
  int64_t InCols() const { return pass_.cols + high_col_ - low_col_; }
  int64_t InFloats() const { return InRows() * InCols() * kVector; }
  int64_t OutFloats() const { return pass_.rows * pass_.cols * kVector; }
  int64_t PackedAligned() const { return RoundUp(PackedFloats(pass_)); }

  // A strip of `rows` x `cols` vectors for each channel of `like`, from position `first` on.
  static LaneMap Map(float* data, const LaneMap& like, int64_t rows, int64_t cols, int64_t first) {
    LaneMap map = {};
    map.data = data + first * kVector;
    map.batch = like.pictures();
    map.channels = like.channels;
    map.row_stride = cols * kVector;
    map.channel_stride = rows * map.row_stride;
    map.batch_stride = like.channels * map.channel_stride;
    return map;
  }

  LaneMap Result(const LaneMap& dx, float* scratch) const {
    return Map(scratch + PackedAligned() + dx.pictures() * shape_.out_channels * InFloats(), dx, pass_.rows, pass_.cols,
               0);
  }

  std::shared_ptr<const Offsets> OffsetsFor(int64_t dy_row_stride, int64_t dx_row_stride) const {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& offsets = offsets_[{dy_row_stride, dx_row_stride}];
    if (offsets) return offsets;
    auto made = std::make_shared<Offsets>();
    ForPositions(InRows(), InCols(), [&](int64_t row, int64_t col, int64_t lane) {
      int64_t y = across_ + low_row_ + row, x = along_ + low_col_ + lane * pass_.cols + col;
      if (turned_) std::swap(y, x);
      const bool inside = y >= 0 && y < out_rows_.side && x >= 0 && x < out_cols_.side;
      made->gather.push_back(inside ? static_cast<int32_t>(PixelOffset(y, x, out_rows_, out_cols_, dy_row_stride))
                                    : -1);
    });
    ForPositions(pass_.rows, pass_.cols, [&](int64_t row, int64_t col, int64_t lane) {
      int64_t y = across_ + row, x = along_ + lane * pass_.cols + col;
      const bool inside = lane * pass_.cols + col < length_;
      if (turned_) std::swap(y, x);
      y = Copied(shape_.stride * y + phase_row_, in_rows_.side, shape_.pad_h);
      x = Copied(shape_.stride * x + phase_col_, in_cols_.side, shape_.pad_w);
      made->scatter.push_back(inside ? static_cast<int32_t>(PixelOffset(y, x, in_rows_, in_cols_, dx_row_stride)) : -1);
    });
    made->gather_lines = Lines(made->gather);
    made->scatter_lines = Lines(made->scatter);
    offsets = made;
    return offsets;
  }

  template <class Body>
  static void ForPositions(int64_t rows, int64_t cols, const Body& body) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        for (int64_t lane = 0; lane < kVector; ++lane) body(row, col, lane);
      }
    }
  }

  // The pixel whose copy stands at `at`, itself inside the picture.
  int64_t Copied(int64_t at, int64_t side, int64_t pad) const {
    return at >= 0 && at < side ? at : PaddingSource(at, side, shape_.padding, pad);
  }

  ConvShape shape_;
  bool turned_;
  int64_t phase_row_, phase_col_;
  int64_t across_, along_, length_;  // the first position, and how many lie along the strip
  Axis in_rows_, in_cols_, out_rows_, out_cols_;
  int64_t low_row_ = 0, high_row_ = 0, low_col_ = 0, high_col_ = 0;  // what taps reach
  Pass pass_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<int64_t, int64_t>, std::shared_ptr<const Offsets>> offsets_;
};

Border::Border(const ConvShape& shape, const ConvGeometry& geometry, const std::vector<Weight>& weights, bool dense)
    : pictures_(geometry.pictures()) {
  if (shape.padding == Padding::kZero) return;
  const int64_t h = geometry.height, w = geometry.width, pad_h = shape.pad_h, pad_w = shape.pad_w;
  const std::pair<Rectangle, bool> sides[] = {{{-pad_h, 0, -pad_w, w + pad_w}, false},
                                              {{h, h + pad_h, -pad_w, w + pad_w}, false},
                                              {{0, h, -pad_w, 0}, true},
                                              {{0, h, w, w + pad_w}, true}};
  for (const auto& [rectangle, turned] : sides) {
    for (int64_t phase = 0; phase < shape.stride * shape.stride; ++phase) {
      auto strip =
          std::make_unique<Strip>(shape, geometry, rectangle, turned, phase / shape.stride, phase % shape.stride);
      strip->SetTaps(weights, dense);
      if (!strip->empty()) strips_.push_back(std::move(strip));
    }
  }
}

Border::~Border() = default;

int64_t Border::scratch_floats() const {
  int64_t floats = 0;
  for (const auto& strip : strips_) floats += strip->ScratchFloats(pictures_);
  return floats;
}

// A strip is small, and calls of the pool cost as much: few threads take a strip each.
void Border::AddTo(const float* values, const LaneMap& dy, const LaneMap& dx, float* scratch, int threads) const {
  if (strips_.empty()) return;
  std::vector<float*> parts;
  for (const auto& strip : strips_) {
    parts.push_back(scratch);
    scratch += strip->ScratchFloats(pictures_);
  }
  const int64_t count = static_cast<int64_t>(strips_.size());
  if (threads <= count) {
    ParallelFor(threads, count, [&](int64_t i) { strips_[i]->Compute(values, dy, dx, parts[i], 1); });
  } else {
    for (int64_t i = 0; i < count; ++i) strips_[i]->Compute(values, dy, dx, parts[i], threads);
  }
  ForPlanes(dx, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < count; ++i) strips_[i]->AddTo(dy, dx, parts[i], first, last);
  });
}

}  // namespace lipfast
