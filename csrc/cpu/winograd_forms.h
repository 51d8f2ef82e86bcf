// The transforms of Winograd's minimal filtering (winograd.h): of tiles and
// filters to frequencies and back, in one dimension and in two. For kernel sources only.
#pragma once

#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

// ---- one dimension -------------------------------------------------------------
// Frequencies come in pairs (lo, hi) that share work: rows 1 and 2, 3 and 4, and the
// first and the last. kPair counts them in this order.

// Points 0, +-kA, +-kB and infinity, exact in float as their powers are.
struct SixPoints {
  static constexpr int kSize = 6, kPairs = 3;
  static constexpr int Lo(int pair) { return pair == 2 ? 0 : 2 * pair + 1; }
  static constexpr int Hi(int pair) { return pair == 2 ? 5 : 2 * pair + 2; }
  static constexpr int PairOf(int row) { return row % 5 ? (row - 1) / 2 : 2; }

  static constexpr float kA = 0.625f, kB = 1.5f;
  static constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA * kA2, kB3 = kB * kB2, kA4 = kA2 * kA2, kB4 = kB2 * kB2;
  // One over the product of a point's distances to the other points.
  static constexpr float kScale0 = 1 / (kA2 * kB2);
  static constexpr float kScaleA = 1 / (2 * kA2 * (kA2 - kB2)), kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

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
};

// kTile pixels of a layer of kTaps taps.
template <int kTile, int kTaps = 3>
struct Points;

template <>
struct Points<4> : SixPoints {
  static constexpr int kTaps = 3;

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
struct Points<2, 5> : SixPoints {
  static constexpr int kTaps = 5;

  template <int kPair>
  static inline void Gradient(const R* d, R& lo, R& hi) {
    const float point = kPair == 0 ? kA : kB;
    lo = kPair == 2 ? d[0] : Fma(SetR(point), d[1], d[0]);
    hi = kPair == 2 ? d[1] : Fma(SetR(-point), d[1], d[0]);
  }

  static inline void Output(const V* m, V* y) {
    y[0] = Add(Add(m[0], Add(m[1], m[2])), Add(m[3], m[4]));
    y[1] = Fma(Set(kB), Sub(m[3], m[4]), Fma(Set(kA), Sub(m[1], m[2]), m[5]));
  }

  static inline void Weight(const V* w, V* u) {
    const V even_a = Mul(Set(kScaleA), Fma(Set(kA4), w[4], Fma(Set(kA2), w[2], w[0])));
    const V even_b = Mul(Set(kScaleB), Fma(Set(kB4), w[4], Fma(Set(kB2), w[2], w[0])));
    const V odd_a = Fma(Set(kA2), w[3], w[1]), odd_b = Fma(Set(kB2), w[3], w[1]);
    u[0] = Mul(Set(kScale0), w[0]);
    u[1] = Fma(Set(kScaleA * kA), odd_a, even_a);
    u[2] = Fma(Set(-kScaleA * kA), odd_a, even_a);
    u[3] = Fma(Set(kScaleB * kB), odd_b, even_b);
    u[4] = Fma(Set(-kScaleB * kB), odd_b, even_b);
    u[5] = w[4];
  }

  static inline void WeightGradient(const V* u, V* w) {
    const V sum_a = Mul(Set(kScaleA), Add(u[1], u[2])), difference_a = Mul(Set(kScaleA), Sub(u[1], u[2]));
    const V sum_b = Mul(Set(kScaleB), Add(u[3], u[4])), difference_b = Mul(Set(kScaleB), Sub(u[3], u[4]));
    w[0] = Fma(Set(kScale0), u[0], Add(sum_a, sum_b));
    w[1] = Fma(Set(kA), difference_a, Mul(Set(kB), difference_b));
    w[2] = Fma(Set(kA2), sum_a, Mul(Set(kB2), sum_b));
    w[3] = Fma(Set(kA3), difference_a, Mul(Set(kB3), difference_b));
    w[4] = Fma(Set(kA4), sum_a, Fma(Set(kB4), sum_b, u[5]));
  }
};

template <>
struct Points<2> {
  static constexpr int kTaps = 3;
  static constexpr int kSize = 4, kPairs = 2;
  static constexpr int Lo(int pair) { return pair == 1 ? 0 : 1; }
  static constexpr int Hi(int pair) { return pair == 1 ? 3 : 2; }
  static constexpr int PairOf(int row) { return row % 3 ? 0 : 1; }

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

// All frequencies of a line of an input's pixels, and of a gradient's.
template <class P>
inline void InputLine(const R* d, R* v) {
  P::template Input<0>(d, v[P::Lo(0)], v[P::Hi(0)]);
  P::template Input<1>(d, v[P::Lo(1)], v[P::Hi(1)]);
  if (P::kPairs == 3) P::template Input<P::kPairs - 1>(d, v[P::Lo(2)], v[P::kSize - 1]);
}

template <class P>
inline void GradientLine(const R* d, R* v) {
  P::template Gradient<0>(d, v[P::Lo(0)], v[P::Hi(0)]);
  P::template Gradient<1>(d, v[P::Lo(1)], v[P::Hi(1)]);
  if (P::kPairs == 3) P::template Gradient<P::kPairs - 1>(d, v[P::Lo(2)], v[P::kSize - 1]);
}

// ---- two dimensions ------------------------------------------------------------
// A Form says how the tiles of one kind of layer become frequencies. Frequency f is row
// f / kSize and column f % kSize of the transformed filter. A tile has Instances(f) values
// of it, all multiplied by the same filter. Frequencies come in kGroups groups that are
// worked out together; GroupOf(f) tells which.
//
// Input<kGroup>(x, lane, put) and Gradient<kGroup>(dy, lane, put) call put(f, instance,
// register) for each value of the group; Output(get, put) asks get(f, instance) for all of
// them and calls put(row, column, vector) for each pixel. Weight and WeightGradient turn
// kTaps taps into kSize frequencies and back, in one dimension.
//
// kTiles tiles are handled together, kFewTiles where the map has few, kGradientTiles in weight
// gradients. More: the weights, which no L2 cache holds, are read less often. Fewer: more of the
// transforms stays in L2, which is smaller where vectors are.
constexpr bool kWide = kRegisters >= 32;

// kPatch x kPatch vectors of one channel, rows `stride` floats apart.
struct Patch {
  const float* data;
  int64_t stride;
  R At(int row, int col, int lane) const { return LoadR(data + row * stride + col * kLanes + lane); }
};

// y[i] = sum of w[k] x[i + k - kTaps / 2].
template <int kT, class P>
struct Unstrided {
  static constexpr int kTile = kT, kTaps = P::kTaps, kSize = P::kSize, kFrequencies = kSize * kSize;
  static constexpr int kInStep = 1, kOutStep = 1;               // pixels from tile pixel to tile pixel
  static constexpr int kBorder = kTaps / 2, kPatch = P::kSize;  // the patch begins kBorder pixels before the tile
  static constexpr int kTiles = kWide ? 4 : 2, kFewTiles = 4, kGradientTiles = 8;
  static constexpr int kGroups = P::kPairs;  // pairs of rows
  static constexpr int Instances(int) { return 1; }
  static constexpr int GroupOf(int f) { return P::PairOf(f / kSize); }

  template <int kGroup, class Put>
  static inline void Input(const Patch& x, int lane, const Put& put) {
    R line[2][kSize];
    LIPFAST_UNROLL
    for (int s = 0; s < kSize; ++s) {
      R d[kSize];
      LIPFAST_UNROLL
      for (int r = 0; r < kSize; ++r) d[r] = x.At(r, s, lane);
      P::template Input<kGroup>(d, line[0][s], line[1][s]);
    }
    LIPFAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      R v[kSize];
      InputLine<P>(line[i], v);
      PutRow(i ? P::Hi(kGroup) : P::Lo(kGroup), v, put);
    }
  }

  template <int kGroup, class Put>
  static inline void Gradient(const Patch& dy, int lane, const Put& put) {
    R line[2][kT];
    LIPFAST_UNROLL
    for (int s = 0; s < kT; ++s) {
      R d[kT];
      LIPFAST_UNROLL
      for (int r = 0; r < kT; ++r) d[r] = dy.At(r, s, lane);
      P::template Gradient<kGroup>(d, line[0][s], line[1][s]);
    }
    LIPFAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      R v[kSize];
      GradientLine<P>(line[i], v);
      PutRow(i ? P::Hi(kGroup) : P::Lo(kGroup), v, put);
    }
  }

  template <class Get, class Put>
  static inline void Output(const Get& get, const Put& put) {
    V half[kT][kSize];
    LIPFAST_UNROLL
    for (int s = 0; s < kSize; ++s) {
      V column[kSize], line[kT];
      LIPFAST_UNROLL
      for (int r = 0; r < kSize; ++r) column[r] = get(r * kSize + s, 0);
      P::Output(column, line);
      LIPFAST_UNROLL
      for (int r = 0; r < kT; ++r) half[r][s] = line[r];
    }
    LIPFAST_UNROLL
    for (int r = 0; r < kT; ++r) {
      V line[kT];
      P::Output(half[r], line);
      LIPFAST_UNROLL
      for (int s = 0; s < kT; ++s) put(r, s, line[s]);
    }
  }

  static inline void Weight(const V* w, V* u) { P::Weight(w, u); }
  static inline void WeightGradient(const V* u, V* w) { P::WeightGradient(u, w); }

 private:
  template <class Put>
  static inline void PutRow(int row, const R* v, const Put& put) {
    LIPFAST_UNROLL
    for (int s = 0; s < kSize; ++s) put(row * kSize + s, 0, v[s]);
  }
};

template <int kT>
using Stride1 = Unstrided<kT, Points<kT>>;
template <int>
using FiveTaps = Unstrided<2, Points<2, 5>>;  // whatever tile is asked for

// y[i] = w[0] x[2i - 1] + w[1] x[2i] + w[2] x[2i + 1]: two taps on the odd pixels, a layer of
// stride 1, and one tap on the even ones, for which no product can be saved. Two taps are
// three of which the first is zero, and so is their frequency 0, always; what is called
// frequency 0 here is the single tap, with an instance for each pixel. In two dimensions
// (2T + 1)^2 products instead of 9 T^2: 1.78 times fewer for T = 4, 1.44 for T = 2.
template <int kT>
struct Stride2 {
  using P = Points<kT>;
  static constexpr int kTile = kT, kTaps = 3, kSize = P::kSize, kFrequencies = kSize * kSize;
  static constexpr int kInStep = 2, kOutStep = 1;
  static constexpr int kBorder = 1, kPatch = 2 * kT + 1;
  static constexpr int kTiles = kWide ? 2 : 1, kFewTiles = kTiles, kGradientTiles = 4;
  static constexpr int kGroups = 4;  // rows by two taps or one, columns by two or one
  static constexpr int Instances(int f) { return (f / kSize ? 1 : kT) * (f % kSize ? 1 : kT); }
  static constexpr int GroupOf(int f) { return (f / kSize ? 0 : 2) + (f % kSize ? 0 : 1); }

  // Odd pixels of the patch begin at row and column 0, even ones at 1.
  template <int kGroup, class Put>
  static inline void Input(const Patch& x, int lane, const Put& put) {
    InputFrom<kGroup, 2, 1>(x, lane, put);
  }

  template <int kGroup, class Put>
  static inline void Gradient(const Patch& dy, int lane, const Put& put) {
    constexpr bool one_row = kGroup & 2, one_col = kGroup & 1;
    constexpr int rows = Lines(one_row);
    R half[kSize][kT];
    LIPFAST_UNROLL
    for (int s = 0; s < kT; ++s) {
      R d[kT], v[kSize];
      LIPFAST_UNROLL
      for (int r = 0; r < kT; ++r) d[r] = dy.At(r, s, lane);
      if (!one_row) GradientLine<P>(d, v);
      LIPFAST_UNROLL
      for (int r = 0; r < rows; ++r) half[r][s] = one_row ? d[r] : v[r + 1];
    }
    LIPFAST_UNROLL
    for (int r = 0; r < rows; ++r) {
      R v[kSize];
      if (!one_col) GradientLine<P>(half[r], v);
      PutLine<one_row, one_col>(r, half[r], v, put);
    }
  }

  template <class Get, class Put>
  static inline void Output(const Get& get, const Put& put) {
    V two[kT][2 * kT + 1], one[kT][2 * kT + 1];
    CollapseRows(get, two, one);
    LIPFAST_UNROLL
    for (int r = 0; r < kT; ++r) {
      V row[2 * kT + 1], line[kT];
      LIPFAST_UNROLL
      for (int s = 0; s < 2 * kT + 1; ++s) row[s] = Add(two[r][s], one[r][s]);
      OutputLine(row + kT - 1, line);
      LIPFAST_UNROLL
      for (int s = 0; s < kT; ++s) put(r, s, Add(line[s], row[s]));
    }
  }

  static inline void Weight(const V* w, V* u) {
    const V taps[3] = {Zero(), w[0], w[2]};
    P::Weight(taps, u);
    u[0] = w[1];
  }

  static inline void WeightGradient(const V* u, V* w) {
    V frequencies[kSize] = {Zero()}, taps[3];
    for (int r = 1; r < kSize; ++r) frequencies[r] = u[r];
    P::WeightGradient(frequencies, taps);
    w[0] = taps[1];
    w[1] = u[0];
    w[2] = taps[2];
  }

 protected:
  static constexpr int Lines(bool one_tap) { return one_tap ? kT : kSize - 1; }

  // Pixels of two taps begin at 0 of the patch, those of one tap at kOneTap, all are kStep apart.
  template <int kGroup, int kStep, int kOneTap, class Put>
  static inline void InputFrom(const Patch& x, int lane, const Put& put) {
    constexpr bool one_row = kGroup & 2, one_col = kGroup & 1;
    constexpr int top = one_row ? kOneTap : 0, left = one_col ? kOneTap : 0;
    constexpr int rows = Lines(one_row), cols = Lines(one_col);
    R half[kSize][kSize];
    LIPFAST_UNROLL
    for (int s = 0; s < cols; ++s) {
      R d[kSize], v[kSize];
      LIPFAST_UNROLL
      for (int r = 0; r < rows; ++r) d[r] = x.At(top + kStep * r, left + kStep * s, lane);
      if (!one_row) TwoTapLine(d, v);
      LIPFAST_UNROLL
      for (int r = 0; r < rows; ++r) half[r][s] = one_row ? d[r] : v[r + 1];
    }
    LIPFAST_UNROLL
    for (int r = 0; r < rows; ++r) {
      R v[kSize];
      if (!one_col) TwoTapLine(half[r], v);
      PutLine<one_row, one_col>(r, half[r], v, put);
    }
  }

  // One line of a group: `pixels` where there is one tap, frequencies v[1..] otherwise.
  template <bool kOneRow, bool kOneCol, class Put>
  static inline void PutLine(int line, const R* pixels, const R* v, const Put& put) {
    const int row = kOneRow ? 0 : line + 1, instance = kOneRow ? line : 0;
    constexpr int cols = Lines(kOneCol);
    LIPFAST_UNROLL
    for (int s = 0; s < cols; ++s) {
      if (kOneCol) {
        put(row * kSize, instance * kT + s, pixels[s]);
      } else {
        put(row * kSize + s + 1, instance, v[s + 1]);
      }
    }
  }

  // The frequencies v[1..] of kSize - 1 pixels; v[0] means nothing.
  static inline void TwoTapLine(const R* pixels, R* v) {
    R d[kSize];
    d[0] = SetR(0.0f);
    LIPFAST_UNROLL
    for (int r = 1; r < kSize; ++r) d[r] = pixels[r - 1];
    InputLine<P>(d, v);
  }

  // kT pixels of frequencies m[1..].
  static inline void OutputLine(const V* m, V* y) {
    V frequencies[kSize];
    frequencies[0] = Zero();
    LIPFAST_UNROLL
    for (int r = 1; r < kSize; ++r) frequencies[r] = m[r];
    P::Output(frequencies, y);
  }

  // Rows of frequencies to rows of pixels, of two taps and of one. Columns: kT pixels
  // of one tap, then the frequencies 1.. of two.
  template <class Get>
  static inline void CollapseRows(const Get& get, V (&two)[kT][2 * kT + 1], V (&one)[kT][2 * kT + 1]) {
    LIPFAST_UNROLL
    for (int s = 0; s < 2 * kT + 1; ++s) {
      const int col = s < kT ? 0 : s - kT + 1, instance = s < kT ? s : 0, across = s < kT ? kT : 1;
      V m[kSize], line[kT];
      LIPFAST_UNROLL
      for (int r = 1; r < kSize; ++r) m[r] = get(r * kSize + col, instance);
      OutputLine(m, line);
      LIPFAST_UNROLL
      for (int r = 0; r < kT; ++r) {
        two[r][s] = line[r];
        one[r][s] = get(col, r * across + instance);
      }
    }
  }
};

// The input gradient of Stride2, with the taps turned round: odd pixels of dx have two taps
// on dy, even ones one.
template <int kT>
struct Stride2Transposed : Stride2<kT> {
  using Base = Stride2<kT>;
  static constexpr int kInStep = 1, kOutStep = 2, kBorder = 0, kPatch = kT + 1;

  template <int kGroup, class Put>
  static inline void Input(const Patch& dy, int lane, const Put& put) {
    Base::template InputFrom<kGroup, 1, 0>(dy, lane, put);
  }

  template <class Get, class Put>
  static inline void Output(const Get& get, const Put& put) {
    V two[kT][2 * kT + 1], one[kT][2 * kT + 1];
    Base::CollapseRows(get, two, one);
    LIPFAST_UNROLL
    for (int r = 0; r < 2 * kT; ++r) {
      const V* row = r % 2 ? two[r / 2] : one[r / 2];
      V line[kT];
      Base::OutputLine(row + kT - 1, line);
      LIPFAST_UNROLL
      for (int s = 0; s < kT; ++s) {
        put(r, 2 * s, row[s]);
        put(r, 2 * s + 1, line[s]);
      }
    }
  }
};

}  // namespace LIPFAST_NS
}  // namespace lipfast
