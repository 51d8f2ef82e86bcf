#include "cpu/resample.h"

#include "cpu/pixel_offsets.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

template <class Body>
void ForEachPlane(const LaneMap& m, int threads, const Body& body) {
  ParallelFor(threads, m.batch * m.channels, [&](int64_t i) { body(i / m.channels, i % m.channels); });
}

// near * 3 / 4 + far / 4
V Blend(V near, V far) { return Fma(near, Set(0.75f), Mul(far, Set(0.25f))); }

void Nearest2(const LaneMap& x, const LaneMap& y, int threads) {
  ForEachPlane(x, threads, [&](int64_t n, int64_t c) {
    for (int64_t row = 0; row < x.block_h; ++row) {
      const float* in = x.At(n, c, row);
      float* upper = y.At(n, c, 2 * row);
      float* lower = y.At(n, c, 2 * row + 1);
      for (int64_t col = 0; col < x.block_w; ++col) {
        const V v = Load(in + col * kLanes);
        Store(upper + 2 * col * kLanes, v);
        Store(upper + (2 * col + 1) * kLanes, v);
        Store(lower + 2 * col * kLanes, v);
        Store(lower + (2 * col + 1) * kLanes, v);
      }
    }
  });
}

// One output row between two input rows: three columns slide along.
void BilinearRow(const float* near, const float* far, float* out, int64_t columns) {
  const auto column = [&](int64_t col) { return Blend(Load(near + col * kLanes), Load(far + col * kLanes)); };
  V left = column(-1), here = column(0);
  for (int64_t col = 0; col < columns; ++col) {
    const V right = column(col + 1);
    Store(out + 2 * col * kLanes, Blend(here, left));
    Store(out + (2 * col + 1) * kLanes, Blend(here, right));
    left = here;
    here = right;
  }
}

void Bilinear2(const LaneMap& x, const LaneMap& y, int threads) {
  ForEachPlane(x, threads, [&](int64_t n, int64_t c) {
    for (int64_t row = 0; row < x.block_h; ++row) {
      BilinearRow(x.At(n, c, row), x.At(n, c, row - 1), y.At(n, c, 2 * row), x.block_w);
      BilinearRow(x.At(n, c, row), x.At(n, c, row + 1), y.At(n, c, 2 * row + 1), x.block_w);
    }
  });
}

void Shuffle(const LaneMap& many, const LaneMap& large, bool to_large, bool accumulate, int threads) {
  const int64_t r = large.block_h / many.block_h;
  ForEachPlane(many, threads, [&](int64_t n, int64_t c) {
    const int64_t down = c / r % r, right = c % r;
    for (int64_t row = 0; row < many.block_h; ++row) {
      float* small = many.At(n, c, row);
      float* wide = large.At(n, c / (r * r), r * row + down, right);
      for (int64_t col = 0; col < many.block_w; ++col) {
        float* const from = to_large ? small + col * kLanes : wide + r * col * kLanes;
        float* const to = to_large ? wide + r * col * kLanes : small + col * kLanes;
        Put(to, Load(from), accumulate);
      }
    }
  });
}

void Nearest2Backward(const LaneMap& dy, const LaneMap& dx, bool accumulate, int threads) {
  ForEachPlane(dx, threads, [&](int64_t n, int64_t c) {
    for (int64_t row = 0; row < dx.block_h; ++row) {
      const float* upper = dy.At(n, c, 2 * row);
      const float* lower = dy.At(n, c, 2 * row + 1);
      float* out = dx.At(n, c, row);
      for (int64_t col = 0; col < dx.block_w; ++col) {
        const V top = Add(Load(upper + 2 * col * kLanes), Load(upper + (2 * col + 1) * kLanes));
        const V bottom = Add(Load(lower + 2 * col * kLanes), Load(lower + (2 * col + 1) * kLanes));
        Put(out + col * kLanes, Add(top, bottom), accumulate);
      }
    }
  });
}

// Input pixel i is three quarters of outputs 2i, 2i + 1 and a quarter of 2i - 1, 2i + 2.
V Gather4(V before, V first, V second, V after) { return Blend(Add(first, second), Add(before, after)); }

void Bilinear2Backward(const LaneMap& dy, const LaneMap& dx, bool accumulate, int threads) {
  ForEachPlane(dx, threads, [&](int64_t n, int64_t c) {
    for (int64_t row = 0; row < dx.block_h; ++row) {
      const float* rows[4];
      for (int64_t k = 0; k < 4; ++k) rows[k] = dy.At(n, c, 2 * row - 1 + k);
      const auto column = [&](int64_t col) {
        const int64_t at = col * kLanes;
        return Gather4(Load(rows[0] + at), Load(rows[1] + at), Load(rows[2] + at), Load(rows[3] + at));
      };
      float* out = dx.At(n, c, row);
      V before = column(-1), first = column(0);
      for (int64_t col = 0; col < dx.block_w; ++col) {
        const V second = column(2 * col + 1), after = column(2 * col + 2);
        Put(out + col * kLanes, Gather4(before, first, second, after), accumulate);
        before = second;
        first = after;
      }
    }
  });
}

// The taps of an output position: up to two input positions and their weights.
struct Taps {
  int count;
  int64_t at[2];
  float weight[2];
};

// offset(i): where input position i lies.
template <class Offset>
std::vector<Taps> TapsOf(const AxisTaps& axis, const Offset& offset) {
  std::vector<Taps> all(axis.count);
  for (int64_t i = 0; i < axis.count; ++i) {
    Taps& taps = all[i];
    if (axis.first[i] < 0) continue;
    taps.count = 1;
    taps.at[0] = offset(axis.first[i]);
    taps.weight[0] = axis.weight ? 1.0f - axis.weight[i] : 1.0f;
    if (axis.weight && axis.weight[i] != 0.0f) {
      taps.count = 2;
      taps.at[1] = offset(axis.second[i]);
      taps.weight[1] = axis.weight[i];
    }
  }
  return all;
}

// body(picture of `tapped`, pixel of `each`, row taps, column taps) for every pixel of every picture of `each`.
template <class Body>
void ForEachTap(const LaneMap& tapped, const LaneMap& each, const AxisTaps& rows, const AxisTaps& columns, int threads,
                const Body& body) {
  const PixelOffsets in(tapped), out(each);
  const std::vector<Taps> vertical = TapsOf(rows, [&](int64_t y) { return in.row(y); });
  const std::vector<Taps> horizontal = TapsOf(columns, [&](int64_t x) { return in.col(x); });
  ForEachPicture(each, threads, [&](int64_t n, int64_t c, int64_t picture) {
    float* from = tapped.At(n, c) + in.picture(picture);
    float* to = each.At(n, c) + out.picture(picture);
    for (int64_t row = 0; row < rows.count; ++row) {
      for (int64_t col = 0; col < columns.count; ++col) {
        body(from, to + out.row(row) + out.col(col), vertical[row], horizontal[col]);
      }
    }
  });
}

void General(const LaneMap& x, const LaneMap& y, const AxisTaps& rows, const AxisTaps& columns, int threads) {
  ForEachTap(x, y, rows, columns, threads,
             [](const float* in, float* out, const Taps& vertical, const Taps& horizontal) {
               float sum = 0;
               for (int i = 0; i < vertical.count; ++i) {
                 for (int j = 0; j < horizontal.count; ++j) {
                   sum += vertical.weight[i] * horizontal.weight[j] * in[vertical.at[i] + horizontal.at[j]];
                 }
               }
               *out = sum;
             });
}

void GeneralBackward(const LaneMap& dy, const LaneMap& dx, const AxisTaps& rows, const AxisTaps& columns, int threads) {
  ForEachTap(dx, dy, rows, columns, threads,
             [](float* out, const float* in, const Taps& vertical, const Taps& horizontal) {
               for (int i = 0; i < vertical.count; ++i) {
                 for (int j = 0; j < horizontal.count; ++j) {
                   out[vertical.at[i] + horizontal.at[j]] += vertical.weight[i] * horizontal.weight[j] * *in;
                 }
               }
             });
}

}  // namespace

extern const ResampleKernels resample_kernels;
const ResampleKernels resample_kernels = {Nearest2, Bilinear2, Nearest2Backward, Bilinear2Backward,
                                          Shuffle,  General,   GeneralBackward};

}  // namespace LIPFAST_NS
}  // namespace lipfast
