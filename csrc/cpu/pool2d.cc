#include "cpu/pool2d.h"

#include <vector>

#include "cpu/halo.h"
#include "cpu/pixel_offsets.h"
#include "cpu/plane_sum.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// The larger, NaN if either is NaN.
V Larger(V a, V b) {
  const V half = Set(0.5f);  // Max returns its second operand where either is NaN
  return Fma(Max(a, b), half, Mul(Max(b, a), half));
}

V LargestInColumn(const float* top, int64_t rows, int64_t row_stride) {
  V largest = Load(top);
  for (int64_t row = 1; row < rows; ++row) largest = Larger(largest, Load(top + row * row_stride));
  return largest;
}

// One row of maxima. Windows that overlap share the maxima of their columns: the last
// kernel - stride of one window are the first of the next.
template <int kKernel, int kStride>
void MaximaOfRow(const float* top, int64_t row_stride, int64_t cols, float* out) {
  V columns[kKernel];
  for (int i = kStride; i < kKernel; ++i)
    columns[i] = LargestInColumn(top + (i - kStride) * kLanes, kKernel, row_stride);
  const float* next = top + (kKernel - kStride) * kLanes;
  for (int64_t col = 0; col < cols; ++col, next += kStride * kLanes) {
    for (int i = 0; i + kStride < kKernel; ++i) columns[i] = columns[i + kStride];
    for (int i = 0; i < kStride; ++i) {
      columns[kKernel - kStride + i] = LargestInColumn(next + i * kLanes, kKernel, row_stride);
    }
    V largest = columns[0];
    for (int i = 1; i < kKernel; ++i) largest = Larger(largest, columns[i]);
    Store(out + col * kLanes, largest);
  }
}

using MaximaFunction = void (*)(const float*, int64_t, int64_t, float*);

// For the windows of most networks; null for others.
MaximaFunction FastMaxima(const PoolSpec& spec) {
  if (!spec.maximum) return nullptr;
  if (spec.kernel == 2 && spec.stride == 2) return MaximaOfRow<2, 2>;
  if (spec.kernel == 3 && spec.stride == 2) return MaximaOfRow<3, 2>;
  return nullptr;
}

// What a pixel weighs in the average of each window.
class Shares {
 public:
  Shares(const LaneMap& x, const LaneMap& y, const PoolSpec& spec)
      : equal_(AllWhole(x.height, y.height, spec) && AllWhole(x.width, y.width, spec)),
        whole_(1.0f / static_cast<float>(spec.kernel * spec.kernel)) {
    if (equal_) return;
    rows_ = OfAxis(y.rows(), x.height, spec, [](const LanePlace& place) { return place.row; });
    columns_ = OfAxis(y.columns(), x.width, spec, [](const LanePlace& place) { return place.col; });
  }
  V At(int64_t row, int64_t col) const {
    return equal_ ? Set(whole_) : Mul(LoadU(rows_[row].of_lane), LoadU(columns_[col].of_lane));
  }

 private:
  struct Lanes {
    float of_lane[kLanes];
  };

  static bool AllWhole(int64_t side, int64_t windows, const PoolSpec& spec) {
    return CountedPixels(0, side, spec) == spec.kernel && CountedPixels(windows - 1, side, spec) == spec.kernel;
  }

  template <class BlockOf>
  static std::vector<Lanes> OfAxis(const Axis& axis, int64_t side, const PoolSpec& spec, const BlockOf& block_of) {
    std::vector<Lanes> shares(axis.block);
    for (int64_t at = 0; at < axis.block; ++at) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t window = block_of(PlaceOf(lane, axis.grid)) * axis.block + at;
        const bool live = window < axis.side;
        shares[at].of_lane[lane] = live ? 1.0f / static_cast<float>(CountedPixels(window, side, spec)) : 0.0f;
      }
    }
    return shares;
  }

  bool equal_;
  float whole_;
  std::vector<Lanes> rows_, columns_;
};

void Forward(const LaneMap& x, const LaneMap& y, const PoolSpec& spec, HaloSpec halo, int threads) {
  const HaloFiller filler(y, halo.padding, halo.pad);
  const MaximaFunction fast = FastMaxima(spec);
  const Shares shares(x, y, spec);
  ParallelFor(threads, y.batch * y.channels, [&](int64_t i) {
    const int64_t n = i / y.channels, c = i % y.channels;
    for (int64_t row = 0; row < y.block_h; ++row) {
      if (fast) {
        fast(x.At(n, c, row * spec.stride - spec.pad, -spec.pad), x.row_stride, y.block_w, y.At(n, c, row));
        continue;
      }
      for (int64_t col = 0; col < y.block_w; ++col) {
        const float* window = x.At(n, c, row * spec.stride - spec.pad, col * spec.stride - spec.pad);
        V result = spec.maximum ? Load(window) : Zero();
        for (int64_t dy = 0; dy < spec.kernel; ++dy) {
          for (int64_t dx = 0; dx < spec.kernel; ++dx) {
            const V v = Load(window + dy * x.row_stride + dx * kLanes);
            result = spec.maximum ? Larger(result, v) : Add(result, v);
          }
        }
        Store(y.At(n, c, row, col), spec.maximum ? result : Mul(result, shares.At(row, col)));
      }
    }
    if (halo.fill) filler.Fill(y.At(n, c));
  });
}

constexpr int64_t kMostInner = 4;  // pixels of a window's side

// The output positions of a block whose windows lie within the block, and so count all their pixels: they go vector by
// vector.
struct Inner {
  int64_t row, last_row, col, last_col;

  bool empty() const { return row >= last_row || col >= last_col; }
  bool HoldsRow(int64_t r) const { return r >= row && r < last_row; }
  bool HoldsCol(int64_t c) const { return c >= col && c < last_col; }
  bool HoldsAll(const LaneMap& dy) const {
    return row == 0 && last_row == dy.block_h && col == 0 && last_col == dy.block_w;
  }
};

Inner InnerWindows(const LaneMap& x, const LaneMap& dy, const PoolSpec& spec) {
  // Where sides are multiples, windows that do not overlap are either alive or dead as a whole.
  const bool multiples = x.height == spec.stride * dy.height && x.width == spec.stride * dy.width;
  const bool apart = spec.pad == 0 && spec.kernel <= spec.stride;
  if (spec.kernel > kMostInner || !multiples || !(apart || x.whole())) return {};
  const int64_t first = (spec.pad + spec.stride - 1) / spec.stride;
  const auto last = [&](int64_t block, int64_t most) {
    const int64_t inside = block + spec.pad < spec.kernel ? 0 : (block + spec.pad - spec.kernel) / spec.stride + 1;
    return AtMost(inside, most);
  };
  return {first, last(x.block_h, dy.block_h), first, last(x.block_w, dy.block_w)};
}

// One window of each lane. Sides and halo of the maps may differ, so each has strides of its own.
template <int kKernel>
void AddToMaximum(const float* in, int64_t in_row, V gradient, float* out, int64_t out_row) {
  V before[kKernel * kKernel];  // the largest pixel before each
  V largest = Load(in);
  LIPFAST_UNROLL
  for (int i = 1; i < kKernel * kKernel; ++i) {
    const V pixel = Load(in + i / kKernel * in_row + i % kKernel * kLanes);
    before[i] = largest;
    largest = IfLarger(pixel, largest, pixel, largest);
  }
  LIPFAST_UNROLL
  for (int i = kKernel * kKernel - 1; i > 0; --i) {
    const V pixel = Load(in + i / kKernel * in_row + i % kKernel * kLanes);
    float* to = out + i / kKernel * out_row + i % kKernel * kLanes;
    Store(to, Add(Load(to), IfLarger(pixel, before[i], gradient, Zero())));
    gradient = IfLarger(pixel, before[i], Zero(), gradient);
  }
  Store(out, Add(Load(out), gradient));
}

template <int kKernel>
void AddToAll(V gradient, float* out, int64_t out_row) {
  LIPFAST_UNROLL
  for (int i = 0; i < kKernel * kKernel; ++i) {
    float* to = out + i / kKernel * out_row + i % kKernel * kLanes;
    Store(to, Add(Load(to), gradient));
  }
}

template <int kKernel>
void BackwardInner(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const PoolSpec& spec, const Inner& inner,
                   int threads) {
  const V share = Set(1.0f / static_cast<float>(kKernel * kKernel));
  ParallelFor(threads, dy.batch * dy.channels, [&](int64_t i) {
    const int64_t n = i / dy.channels, c = i % dy.channels;
    for (int64_t row = inner.row; row < inner.last_row; ++row) {
      for (int64_t col = inner.col; col < inner.last_col; ++col) {
        const V gradient = Load(dy.At(n, c, row, col));
        const int64_t top = row * spec.stride - spec.pad, left = col * spec.stride - spec.pad;
        float* out = dx.At(n, c, top, left);
        if (spec.maximum) {
          AddToMaximum<kKernel>(x.At(n, c, top, left), x.row_stride, gradient, out, dx.row_stride);
        } else {
          AddToAll<kKernel>(Mul(gradient, share), out, dx.row_stride);
        }
      }
    }
  });
}

using InnerFunction = void (*)(const LaneMap&, const LaneMap&, const LaneMap&, const PoolSpec&, const Inner&, int);
constexpr InnerFunction kBackwardInner[] = {BackwardInner<1>, BackwardInner<2>, BackwardInner<3>, BackwardInner<4>};

// The pixels of the window of output (row, col) that lie in the picture.
struct Window {
  int64_t top, bottom, left, right;
};

Window WindowAt(const LaneMap& x, const PoolSpec& spec, int64_t row, int64_t col) {
  const int64_t top = row * spec.stride - spec.pad, left = col * spec.stride - spec.pad;
  const int64_t bottom = top + spec.kernel, right = left + spec.kernel;
  return {top < 0 ? 0 : top, bottom > x.height ? x.height : bottom, left < 0 ? 0 : left,
          right > x.width ? x.width : right};
}

struct Pixel {
  int64_t row, col;
};

Pixel FirstMaximum(const float* in, const PixelOffsets& at, const Window& w) {
  Pixel best = {w.top, w.left};
  float largest = in[at.row(w.top) + at.col(w.left)];
  for (int64_t row = w.top; row < w.bottom; ++row) {
    for (int64_t col = w.left; col < w.right; ++col) {
      const float pixel = in[at.row(row) + at.col(col)];
      if (pixel > largest || pixel != pixel) {
        largest = pixel;
        best = {row, col};
      }
    }
  }
  return best;
}

// The others pixel by pixel: windows may overlap across blocks.
void BackwardOthers(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const PoolSpec& spec, const Inner& inner,
                    int threads) {
  const PixelOffsets in_at(x), gradient_at(dy), out_at(dx);
  ForEachPicture(dy, threads, [&](int64_t n, int64_t c, int64_t picture) {
    const float* in = x.At(n, c) + in_at.picture(picture);
    const float* gradient = dy.At(n, c) + gradient_at.picture(picture);
    float* out = dx.At(n, c) + out_at.picture(picture);
    const auto add = [&](int64_t row, int64_t col) {
      const Window w = WindowAt(x, spec, row, col);
      const float g = gradient[gradient_at.row(row) + gradient_at.col(col)];
      if (spec.maximum) {
        const Pixel best = FirstMaximum(in, in_at, w);
        out[out_at.row(best.row) + out_at.col(best.col)] += g;
        return;
      }
      const float share =
          1.0f / static_cast<float>(CountedPixels(row, x.height, spec) * CountedPixels(col, x.width, spec));
      for (int64_t r = w.top; r < w.bottom; ++r) {
        for (int64_t q = w.left; q < w.right; ++q) out[out_at.row(r) + out_at.col(q)] += g * share;
      }
    };
    for (int64_t row = 0; row < dy.height; ++row) {
      const bool inner_row = inner.HoldsRow(row % dy.block_h);
      for (int64_t block = 0; block < dy.width; block += dy.block_w) {
        const int64_t last = AtMost(dy.block_w, dy.width - block);
        for (int64_t col = 0; col < last; ++col) {
          if (inner_row && inner.HoldsCol(col)) {
            col = inner.last_col - 1;  // and on behind them
          } else {
            add(row, block + col);
          }
        }
      }
    }
  });
}

void Backward(const LaneMap& x, const LaneMap& dy, const LaneMap& dx, const PoolSpec& spec, int threads) {
  const Inner inner = InnerWindows(x, dy, spec);
  if (!inner.empty()) kBackwardInner[spec.kernel - 1](x, dy, dx, spec, inner, threads);
  if (!inner.HoldsAll(dy)) BackwardOthers(x, dy, dx, spec, inner, threads);
}

void Mean(const LaneMap& x, const LaneMap& y, const LivePixelMask& live, int threads) {
  const V share = Set(1.0f / static_cast<float>(x.height * x.width));
  ParallelFor(threads, x.batch * x.channels, [&](int64_t i) {
    const int64_t n = i / x.channels, c = i % x.channels;
    const V sums = SumLanes(x, live, [&](int64_t row, int64_t i) { return Load(x.At(n, c, row) + i); });
    Store(y.At(n, c), Mul(SumPictures(sums, x.grid), share));
  });
}

void MeanBackward(const LaneMap& dy, const LaneMap& dx, int threads) {
  const V share = Set(1.0f / static_cast<float>(dx.height * dx.width));
  ParallelFor(threads, dx.batch * dx.channels, [&](int64_t i) {
    const int64_t n = i / dx.channels, c = i % dx.channels;
    const V change = Mul(SpreadPictures(dy.At(n, c), dx.grid), share);
    for (int64_t row = 0; row < dx.block_h; ++row) {
      float* out = dx.At(n, c, row);
      for (int64_t col = 0; col < dx.block_w; ++col) {
        Store(out + col * kLanes, Add(Load(out + col * kLanes), change));
      }
    }
  });
}

// body(plane of `windowed`, window, pixel of `each`) for every pixel of every picture of `each`, whose windows cover
// `windowed`.
template <class Body>
void ForEachWindow(const LaneMap& windowed, const LaneMap& each, int threads, const Body& body) {
  const PixelOffsets inside(windowed), at(each);
  const auto first = [](int64_t i, int64_t from, int64_t to) { return i * from / to; };
  const auto last = [](int64_t i, int64_t from, int64_t to) { return ((i + 1) * from + to - 1) / to; };
  ForEachPicture(each, threads, [&](int64_t n, int64_t c, int64_t picture) {
    float* from = windowed.At(n, c) + inside.picture(picture);
    float* to = each.At(n, c) + at.picture(picture);
    for (int64_t row = 0; row < each.height; ++row) {
      for (int64_t col = 0; col < each.width; ++col) {
        const Window w = {first(row, windowed.height, each.height), last(row, windowed.height, each.height),
                          first(col, windowed.width, each.width), last(col, windowed.width, each.width)};
        body(from, inside, w, to + at.row(row) + at.col(col));
      }
    }
  });
}

float ShareOf(const Window& w) { return 1.0f / static_cast<float>((w.bottom - w.top) * (w.right - w.left)); }

void MeanTo(const LaneMap& x, const LaneMap& y, int threads) {
  ForEachWindow(x, y, threads, [](const float* in, const PixelOffsets& at, const Window& w, float* out) {
    float sum = 0;
    for (int64_t row = w.top; row < w.bottom; ++row) {
      for (int64_t col = w.left; col < w.right; ++col) sum += in[at.row(row) + at.col(col)];
    }
    *out = sum * ShareOf(w);
  });
}

void MeanToBackward(const LaneMap& dy, const LaneMap& dx, int threads) {
  ForEachWindow(dx, dy, threads, [](float* out, const PixelOffsets& at, const Window& w, const float* gradient) {
    const float change = *gradient * ShareOf(w);
    for (int64_t row = w.top; row < w.bottom; ++row) {
      for (int64_t col = w.left; col < w.right; ++col) out[at.row(row) + at.col(col)] += change;
    }
  });
}

}  // namespace

extern const PoolKernels pool_kernels;
const PoolKernels pool_kernels = {Forward, Backward, Mean, MeanBackward, MeanTo, MeanToBackward};

}  // namespace LIPFAST_NS
}  // namespace lipfast
