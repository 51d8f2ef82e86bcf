#include "cpu/channel_attention.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/activation.h"
#include "cpu/plane_sum.h"
#include "cpu/pool.h"
#include "cpu/products.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

using Spec = ChannelAttentionSpec;

constexpr int kLeft = 8;  // planes that are multiplied with two others at a time
constexpr int kPart = kRegisters >= 32 ? kLeft : 2;
constexpr int64_t kTogether = 32;  // vectors of each, which stay in the first cache level

int64_t Padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// The planes of a head.
struct Planes {
  const LaneMap& map;
  float* data;

  Planes(const ChannelHeads& heads, int64_t problem) : map(heads.map), data(heads.map.data + heads.at[problem]) {}
  float* At(int64_t c, int64_t row, int64_t col = 0) const {
    return data + c * map.channel_stride + row * map.row_stride + col * kLanes;
  }
};

// A problem's matrices, [channels][Padded(channels)] or the other way round, and its vectors.
struct Matrices {
  float* weights;                // the softmax: a row is what one channel sees of each
  float* turned;                 // the other way round: weights, in backward slopes
  float *of_query, *of_key;      // 1 / norm of each plane
  float* slopes;                 // of backward: gradients of the products of planes
  float* pull;                   // of backward: slopes times products, of planes that have been divided by their norms
  float *query_pull, *key_pull;  // of backward: what planes lose for being divided

  Matrices(const Spec& s, int64_t problem, bool backward, float* scratch) {
    const int64_t vector = Padded(s.channels), matrix = s.channels * vector;
    float* next = scratch + problem * Floats(s, backward);
    const auto take = [&](int64_t floats) { return next += floats, next - floats; };
    weights = take(matrix), turned = take(matrix), of_query = take(vector), of_key = take(vector);
    if (!backward) return;
    slopes = take(matrix), pull = take(matrix), query_pull = take(vector), key_pull = take(vector);
  }

  static int64_t Floats(const Spec& s, bool backward) {
    const int64_t vector = Padded(s.channels), matrix = s.channels * vector;
    return backward ? 4 * matrix + 4 * vector : 2 * matrix + 2 * vector;
  }
};

int64_t Floats(const Spec& s, bool backward) { return s.problems * Matrices::Floats(s, backward); }

// Some of a plane's vectors.
struct Slab {
  int64_t row, rows, col, cols;
};

// body(slab) for slabs of at most kTogether vectors that make up a plane
template <class Body>
void ForSlabs(const LaneMap& m, const Body& body) {
  const int64_t cols = AtMost(kTogether, m.block_w), rows = AtMost(kTogether / cols, m.block_h);
  for (int64_t row = 0; row < m.block_h; row += rows) {
    for (int64_t col = 0; col < m.block_w; col += cols) {
      body(Slab{row, AtMost(rows, m.block_h - row), col, AtMost(cols, m.block_w - col)});
    }
  }
}

// body(row, col) for the vectors of a slab
template <class Body>
inline void ForVectors(const Slab& slab, const Body& body) {
  for (int64_t row = slab.row; row < slab.row + slab.rows; ++row) {
    for (int64_t col = slab.col; col < slab.col + slab.cols; ++col) body(row, col);
  }
}

// kLeft planes from `first` on side by side, zeros where there is no plane and no pixel.
void Pack(const Planes& planes, const Spec& s, int64_t first, const Slab& slab, float* to) {
  const int64_t count = AtMost(kLeft, s.channels - first);
  ForVectors(slab, [&](int64_t row, int64_t col) {
    V live = Set(1.0f);
    if (s.live.rows) live = Mul(LoadU(s.live.rows + row * kLanes), LoadU(s.live.columns + col * kLanes));
    for (int64_t r = 0; r < kLeft; ++r, to += kLanes) {
      Store(to, r < count ? Mul(Load(planes.At(first + r, row, col)), live) : Zero());
    }
  });
}

// Sums over a slab of products of packed planes with plane c and the one `next` further on, as StoreFolded has them.
void SumProducts(const float* packed, const Planes& planes, int64_t c, int64_t next, const Slab& slab, float* folded) {
  for (int first = 0; first < kLeft; first += kPart) {
    const float* left = packed + first * kLanes;
    V one[kPart], other[kPart];
    LIPFAST_UNROLL
    for (int r = 0; r < kPart; ++r) one[r] = other[r] = Zero();
    ForVectors(slab, [&](int64_t row, int64_t col) {
      const V a = Load(planes.At(c, row, col)), b = Load(planes.At(c + next, row, col));
      LIPFAST_UNROLL
      for (int r = 0; r < kPart; ++r) {
        const V v = Load(left + r * kLanes);
        one[r] = Fma(v, a, one[r]);
        other[r] = Fma(v, b, other[r]);
      }
      left += kLeft * kLanes;
    });
    LIPFAST_UNROLL
    for (int r = 0; r < kPart; ++r) {
      StoreFolded(folded + (first + r) * kFolded, one[r]);
      StoreFolded(folded + (kLeft + first + r) * kFolded, other[r]);
    }
  }
}

// columns[c * Padded + r] = sum over live pixels of plane first + r of `a` times plane c of `b`, for kLeft of them.
void ProductsOfPlanes(const Planes& a, const Planes& b, const Spec& s, int64_t first, float* columns) {
  const int64_t apart = Padded(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) std::memset(columns + c * apart, 0, kLeft * sizeof(float));
  ForSlabs(a.map, [&](const Slab& slab) {
    alignas(64) float packed[kTogether * kLeft * kLanes], folded[kLanes * kFolded], sums[kLanes];
    Pack(a, s, first, slab, packed);
    for (int64_t c = 0; c < s.channels; c += 2) {
      const int64_t both = AtMost(2, s.channels - c);
      SumProducts(packed, b, c, both - 1, slab, folded);
      Store(sums, SumEach(folded));
      for (int64_t i = 0; i < both * kLeft; ++i) columns[(c + i / kLeft) * apart + i % kLeft] += sums[i];
    }
  });
}

// The same with what belongs to planes `first` to `last` of `a` side by side, in their rows of a matrix. `turned`: a
// matrix to work in.
void ProductsOfRows(const Planes& a, const Planes& b, const Spec& s, int64_t first, int64_t last, float* turned,
                    float* matrix) {
  const int64_t apart = Padded(s.channels);
  ProductsOfPlanes(a, b, s, first, turned + first);
  for (int64_t r = first; r < last; ++r) {
    for (int64_t c = 0; c < s.channels; ++c) matrix[r * apart + c] = turned[c * apart + r];
  }
}

// body(problem, first, last) for groups of channels of each problem
template <class Body>
void ForRows(const Spec& s, int threads, const Body& body) {
  const int64_t groups = (s.channels + kLeft - 1) / kLeft;
  ParallelFor(threads, s.problems * groups, [&](int64_t i) {
    const int64_t first = i % groups * kLeft;
    body(i / groups, first, AtMost(first + kLeft, s.channels));
  });
}

// 1 / norm of each plane of all problems, as `store(problem, c, inverse)`
template <class Keep>
void InverseNorms(const ChannelHeads& heads, const Spec& s, int threads, const Keep& store) {
  ParallelFor(threads, s.problems * s.channels, [&](int64_t i) {
    const Planes planes(heads, i / s.channels);
    const int64_t c = i % s.channels;
    const V squares = SumLanes(heads.map, s.live, [&](int64_t row, int64_t at) {
      const V v = Load(planes.At(c, row) + at);
      return Mul(v, v);
    });
    const float norm = std::sqrt(Sum(squares));
    store(i / s.channels, c, 1.0f / (norm < s.epsilon ? s.epsilon : norm));
  });
}

void AllNorms(const ChannelHeads& query, const ChannelHeads& key, const Spec& s, bool backward, float* scratch,
              int threads) {
  const auto of = [&](int64_t problem) { return Matrices(s, problem, backward, scratch); };
  if (s.epsilon >= 0) {
    InverseNorms(query, s, threads, [&](int64_t problem, int64_t c, float v) { of(problem).of_query[c] = v; });
    InverseNorms(key, s, threads, [&](int64_t problem, int64_t c, float v) { of(problem).of_key[c] = v; });
    return;
  }
  for (int64_t problem = 0; problem < s.problems; ++problem) {
    const Matrices m = of(problem);
    for (int64_t c = 0; c < s.channels; ++c) m.of_query[c] = m.of_key[c] = 1.0f;
  }
}

// All that scores are multiplied by, norms aside.
float ScaleOf(const Spec& s, int64_t problem) { return s.factors ? s.scale * s.factors[problem] : s.scale; }

// A row of products over norms to its softmax: weights[c] for scale * products[c].
void Softmax(const Spec& s, float scale, const float* products, float* weights) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t c = 0; c < s.channels; ++c) {
    weights[c] = scale * products[c];
    largest = weights[c] > largest ? weights[c] : largest;
  }
  for (int64_t c = s.channels; c < Padded(s.channels); ++c) weights[c] = -std::numeric_limits<float>::infinity();
  V sum = Zero();
  for (int64_t c = 0; c < s.channels; c += kLanes) {
    const V e = Exp(Sub(Load(weights + c), Set(largest)));
    Store(weights + c, e);
    sum = Add(sum, e);
  }
  const V inverse = Set(1.0f / Sum(sum));
  for (int64_t c = 0; c < s.channels; c += kLanes) Store(weights + c, Mul(Load(weights + c), inverse));
}

void OverNorms(const Spec& s, const Matrices& m, int64_t row, float* products) {
  for (int64_t c = 0; c < s.channels; ++c) products[c] *= m.of_query[row] * m.of_key[c];
}

// to(c, row, col) (+)= sum over terms of numbers times planes, less `loss` times the planes of `own`, for one row of
// blocks.
struct Mix {
  const Planes &planes, &to;
  Numbers numbers;
  bool add;
  const Planes* own;
  const float* loss;

  template <int kVectors>
  void At(const Spec& s, int64_t row, int64_t col) const {
    Products<kVectors>(
        numbers, s.channels, s.channels, planes.At(0, row, col), planes.map.channel_stride,
        [&](int64_t c, int i, V sum) {
          float* at = to.At(c, row, col + i);
          if (own) sum = Sub(sum, Mul(Set(loss[c]), Load(own->At(c, row, col + i))));
          Put(at, sum, add);
        },
        !add);
  }

  void Row(const Spec& s, int64_t row) const {
    int64_t col = 0;
    for (; col + kAcross <= planes.map.block_w; col += kAcross) At<kAcross>(s, row, col);
    for (; col < planes.map.block_w; ++col) At<1>(s, row, col);
  }
};

void Forward(const ChannelHeads& query, const ChannelHeads& key, const ChannelHeads& value, const ChannelHeads& seen,
             const Spec& s, float* scratch, int threads) {
  const int64_t apart = Padded(s.channels);
  AllNorms(query, key, s, false, scratch, threads);
  ForRows(s, threads, [&](int64_t problem, int64_t first, int64_t last) {
    const Matrices m(s, problem, false, scratch);
    ProductsOfRows(Planes(query, problem), Planes(key, problem), s, first, last, m.turned, m.weights);
    for (int64_t r = first; r < last; ++r) {
      float* row = m.weights + r * apart;
      OverNorms(s, m, r, row);
      Softmax(s, ScaleOf(s, problem), row, row);
      for (int64_t c = 0; c < s.channels; ++c) m.turned[c * apart + r] = row[c];
    }
  });
  const int64_t rows = seen.map.block_h;
  ParallelFor(threads, s.problems * rows, [&](int64_t i) {
    const Planes from(value, i / rows), to(seen, i / rows);
    const Matrices m(s, i / rows, false, scratch);
    Mix{from, to, {m.turned, apart}, false, nullptr, nullptr}.Row(s, i % rows);
  });
}

// Of one row: the softmax, and the gradients of the products of planes.
void SlopesOfRow(const Spec& s, const Matrices& m, float scale, int64_t r) {
  const int64_t apart = Padded(s.channels);
  float *weights = m.weights + r * apart, *slopes = m.slopes + r * apart, *pull = m.pull + r * apart;
  OverNorms(s, m, r, pull);
  Softmax(s, scale, pull, weights);
  float dot = 0;
  for (int64_t c = 0; c < s.channels; ++c) dot += weights[c] * slopes[c];
  for (int64_t c = 0; c < s.channels; ++c) {
    const float slope = weights[c] * (slopes[c] - dot);
    pull[c] *= slope;
    slopes[c] = scale * slope * m.of_query[r] * m.of_key[c];
    m.turned[c * apart + r] = slopes[c];
  }
}

// What dividing planes by their norms takes off their gradients, for each unit of the plane; none where epsilon stood
// in. Returns the gradient of the factor.
float LossesOf(const Spec& s, const Matrices& m, float scale) {
  const int64_t apart = Padded(s.channels);
  std::memset(m.query_pull, 0, apart * sizeof(float));
  std::memset(m.key_pull, 0, apart * sizeof(float));
  float total = 0;
  for (int64_t r = 0; r < s.channels; ++r) {
    for (int64_t c = 0; c < s.channels; ++c) {
      const float pull = m.pull[r * apart + c];
      m.query_pull[r] += pull;
      m.key_pull[c] += pull;
    }
    total += m.query_pull[r];
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    const auto divided = [&](float inverse) { return s.epsilon >= 0 && inverse < 1.0f / s.epsilon ? inverse : 0.0f; };
    const float query = divided(m.of_query[c]), key = divided(m.of_key[c]);
    m.query_pull[c] *= scale * query * query;
    m.key_pull[c] *= scale * key * key;
  }
  return s.scale * total;
}

void Backward(const ChannelHeads& query, const ChannelHeads& key, const ChannelHeads& value, const ChannelHeads& dy,
              const ChannelHeads* dquery, const ChannelHeads* dkey, const ChannelHeads* dvalue, const Spec& s,
              float* scratch, int threads) {
  const int64_t apart = Padded(s.channels);
  AllNorms(query, key, s, true, scratch, threads);
  ForRows(s, threads, [&](int64_t problem, int64_t first, int64_t last) {
    const Matrices m(s, problem, true, scratch);
    ProductsOfRows(Planes(query, problem), Planes(key, problem), s, first, last, m.turned, m.pull);
    ProductsOfRows(Planes(dy, problem), Planes(value, problem), s, first, last, m.turned, m.slopes);
    for (int64_t r = first; r < last; ++r) SlopesOfRow(s, m, ScaleOf(s, problem), r);
  });
  for (int64_t problem = 0; problem < s.problems; ++problem) {
    const float of_factor = LossesOf(s, Matrices(s, problem, true, scratch), ScaleOf(s, problem));
    if (s.factor_gradient) s.factor_gradient[problem] = of_factor;
  }
  const int64_t rows = dy.map.block_h;
  ParallelFor(threads, s.problems * rows, [&](int64_t i) {
    const int64_t problem = i / rows, row = i % rows;
    const Matrices m(s, problem, true, scratch);
    const Planes q(query, problem), k(key, problem), gradient(dy, problem);
    const auto add = [&](const ChannelHeads* to, const Planes& planes, const float* numbers, const Planes* own,
                         const float* loss) {
      if (to) Mix{planes, Planes(*to, problem), {numbers, apart}, true, own, loss}.Row(s, row);
    };
    add(dquery, k, m.turned, &q, m.query_pull);
    add(dkey, q, m.slopes, &k, m.key_pull);
    add(dvalue, gradient, m.weights, nullptr, nullptr);
  });
}

}  // namespace

extern const ChannelAttentionKernels channel_attention_kernels;
const ChannelAttentionKernels channel_attention_kernels = {Forward, Backward, Floats};

}  // namespace LIPFAST_NS
}  // namespace lipfast
