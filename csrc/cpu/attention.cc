#include "cpu/attention.h"

#include <cstring>

#include "cpu/activation.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// Runs of heads that have memory of their own, and how much all of them take together.
constexpr int64_t kLeastChunks = 4, kMostChunks = 32, kMostFloats = 1 << 24;
constexpr int kAcross = kRegisters >= 32 ? 2 : 1;  // vectors of tokens that are worked on together
constexpr int kRows = kRegisters >= 32 ? 8 : 6;    // numbers that each of them is multiplied by
constexpr int64_t kWide = int64_t{kAcross} * kLanes;

int64_t AtMost(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Padded(int64_t tokens) { return (tokens + kWide - 1) / kWide * kWide; }

// Of sums of numbers times vectors, the numbers: that of row r and term t is data[t * apart + r].
struct Numbers {
  const float* data;
  int64_t apart;
};

// store(r, i, sum over terms of numbers(r, t) * vectors[t]) for kMany rows from `first` on and each of kAcross vectors.
template <int kMany, class Sum>
inline void SomeProducts(const Numbers& numbers, int64_t first, int64_t terms, const float* vectors, int64_t apart,
                         const Sum& store) {
  const float* number = numbers.data + first;
  V sums[kMany][kAcross];
  LIPFAST_UNROLL
  for (int r = 0; r < kMany; ++r) {
    LIPFAST_UNROLL
    for (int i = 0; i < kAcross; ++i) sums[r][i] = Zero();
  }
  for (int64_t t = 0; t < terms; ++t, number += numbers.apart, vectors += apart) {
    V v[kAcross];
    LIPFAST_UNROLL
    for (int i = 0; i < kAcross; ++i) v[i] = Load(vectors + i * kLanes);
    LIPFAST_UNROLL
    for (int r = 0; r < kMany; ++r) {
      LIPFAST_UNROLL
      for (int i = 0; i < kAcross; ++i) sums[r][i] = Fma(Set(number[r]), v[i], sums[r][i]);
    }
  }
  LIPFAST_UNROLL
  for (int r = 0; r < kMany; ++r) {
    LIPFAST_UNROLL
    for (int i = 0; i < kAcross; ++i) store(first + r, i, sums[r][i]);
  }
}

// The same for all rows; the last ones may be done twice.
template <class Sum>
inline void Products(const Numbers& numbers, int64_t rows, int64_t terms, const float* vectors, int64_t apart,
                     const Sum& store) {
  if (rows < kRows) {
    for (int64_t r = 0; r < rows; ++r) SomeProducts<1>(numbers, r, terms, vectors, apart, store);
    return;
  }
  for (int64_t r = 0; r < rows; r += kRows) {
    SomeProducts<kRows>(numbers, AtMost(r, rows - kRows), terms, vectors, apart, store);
  }
}

// Memory of one chunk, handed out piece by piece.
struct Memory {
  float* next;
  float* Take(int64_t floats) {
    float* taken = next;
    next += (floats + kLanes - 1) / kLanes * kLanes;
    return taken;
  }
};

constexpr int64_t kLine = 16;  // floats

// The tokens of a picture and head in a map.
struct Tokens {
  const LaneMap& map;
  float* plane;           // of the first feature
  const int64_t* pixels;  // of each token, in a plane
  int64_t count, features;

  Tokens(const LaneMap& map, const HeadPlaces& places, int64_t picture, int64_t head, int64_t count, int64_t features,
         Memory* memory)
      : map(map), plane(map.At(0, places.first + head * places.apart)), count(count), features(features) {
    auto* found = reinterpret_cast<int64_t*>(memory->Take(2 * count));
    for (int64_t token = 0; token < count; ++token) {
      const int64_t pixel = picture * places.of_picture + token * places.of_token;
      const int64_t y = pixel / map.width, x = pixel % map.width;
      found[token] = y % map.block_h * map.row_stride + x % map.block_w * kLanes +
                     LaneAt(0, y / map.block_h, x / map.block_w, map.grid);
    }
    pixels = found;
  }

  float* PlaneOf(int64_t feature) const { return plane + feature * map.channel_stride; }

  // [features][Padded(count)], zeros behind the last token
  void ToVectors(float factor, float* to) const {
    for (int64_t f = 0; f < features; ++f, to += Padded(count)) {
      const float* from = PlaneOf(f);
      for (int64_t token = 0; token < count; ++token) to[token] = factor * from[pixels[token]];
      for (int64_t token = count; token < Padded(count); ++token) to[token] = 0.0f;
    }
  }

  // [count][features], a line of the cache at a time
  void ToRows(float factor, float* to) const {
    for (int64_t first = 0; first < features; first += kLine) {
      const int64_t last = AtMost(first + kLine, features);
      for (int64_t token = 0; token < count; ++token) {
        const float* from = plane + pixels[token];
        for (int64_t f = first; f < last; ++f) to[token * features + f] = factor * from[f * map.channel_stride];
      }
    }
  }

  // The reverse of ToVectors, put there or added.
  void FromVectors(const float* from, bool add) const {
    for (int64_t f = 0; f < features; ++f, from += Padded(count)) {
      float* to = PlaneOf(f);
      for (int64_t token = 0; token < count; ++token) {
        float& at = to[pixels[token]];
        at = add ? at + from[token] : from[token];
      }
    }
  }
};

// What a chunk takes: tokens as vectors and as rows, scores, and where tokens lie.
int64_t ChunkFloats(const AttentionSpec& s, bool backward) {
  const int64_t queries = Padded(s.queries), keys = Padded(s.keys), longest = queries > keys ? queries : keys;
  const int64_t tokens = s.features * (queries + keys);
  const int64_t pieces = 32 * kLanes + 8 * (queries + keys);  // what rounding adds to each, and the pixels of tokens
  return backward ? 6 * tokens + 3 * queries + 2 * longest * kWide + pieces : 2 * tokens + keys * kWide + pieces;
}

// As many as there are heads, unless they take too much memory.
int64_t Chunks(const AttentionSpec& s, bool backward) {
  const int64_t fitting = kMostFloats / ChunkFloats(s, backward);
  return AtMost(s.pictures * s.heads, fitting < kLeastChunks ? kLeastChunks : AtMost(fitting, kMostChunks));
}

int64_t Floats(const AttentionSpec& s, bool backward) { return Chunks(s, backward) * ChunkFloats(s, backward); }

// body(picture, head, memory) for all heads of all pictures
template <class Body>
void ForHeads(const AttentionSpec& s, bool backward, float* scratch, int threads, const Body& body) {
  const int64_t chunks = Chunks(s, backward), all = s.pictures * s.heads;
  ParallelFor(threads, chunks, [&](int64_t chunk) {
    for (int64_t i = chunk * all / chunks; i < (chunk + 1) * all / chunks; ++i) {
      body(i / s.heads, i % s.heads, Memory{scratch + chunk * ChunkFloats(s, backward)});
    }
  });
}

// Of scores [keys][kWide]: their softmax, but for the division by the sums. Gives the largest ones and 1 / sum.
void Exponentials(int64_t keys, float* scores, V* largest, V* inverse) {
  for (int i = 0; i < kAcross; ++i) {
    V most = Load(scores + i * kLanes);
    for (int64_t k = 1; k < keys; ++k) most = Max(most, Load(scores + k * kWide + i * kLanes));
    V sum = Zero();
    for (int64_t k = 0; k < keys; ++k) {
      float* at = scores + k * kWide + i * kLanes;
      const V e = Exp(Sub(Load(at), most));
      Store(at, e);
      sum = Add(sum, e);
    }
    largest[i] = most;
    inverse[i] = Div(Set(1.0f), sum);
  }
}

void Forward(const LaneMap& query, const LaneMap& key, const LaneMap& value, const LaneMap& seen,
             const AttentionSpec& s, float* scratch, int threads) {
  if (!seen.whole() || s.pictures * s.queries < seen.pixels()) {
    ParallelFor(threads, seen.channels, [&](int64_t c) {
      for (int64_t row = 0; row < seen.block_h; ++row) {
        std::memset(seen.At(0, c, row), 0, seen.block_w * kLanes * sizeof(float));
      }
    });
  }
  ForHeads(s, false, scratch, threads, [&](int64_t picture, int64_t head, Memory memory) {
    const int64_t queries = Padded(s.queries), keys = Padded(s.keys), f = s.features;
    float *q = memory.Take(f * queries), *k = memory.Take(f * keys), *v = memory.Take(s.keys * f);
    float *y = memory.Take(f * queries), *scores = memory.Take(s.keys * kWide);
    Tokens(query, s.query, picture, head, s.queries, f, &memory).ToVectors(s.scale, q);
    Tokens(key, s.key, picture, head, s.keys, f, &memory).ToVectors(1.0f, k);
    Tokens(value, s.value, picture, head, s.keys, f, &memory).ToRows(1.0f, v);
    for (int64_t at = 0; at < queries; at += kWide) {
      Products({k, keys}, s.keys, f, q + at, queries,
               [=](int64_t r, int i, V sum) { Store(scores + r * kWide + i * kLanes, sum); });
      V largest[kAcross], inverse[kAcross];
      Exponentials(s.keys, scores, largest, inverse);
      Products({v, f}, f, s.keys, scores, kWide,
               [&](int64_t r, int i, V sum) { Store(y + r * queries + at + i * kLanes, Mul(sum, inverse[i])); });
    }
    Tokens(seen, s.seen, picture, head, s.queries, f, &memory).FromVectors(y, false);
  });
}

// One head, as vectors of tokens [features][padded tokens] and as rows of features [tokens][features].
struct Both {
  float *vectors, *rows;
};

struct HeadOfBackward {
  Both q, k, v, dy;
  float *largest, *inverse, *dot;          // [queries]: of the softmax, and of its gradient
  float *weights, *slopes, *dq, *dk, *dv;  // of kWide tokens; gradients by vectors
};

// With queries in the lanes: what the softmax and its gradient need of each query, and the gradient of the queries.
void BackwardOfQueries(const AttentionSpec& s, const HeadOfBackward& h) {
  const int64_t queries = Padded(s.queries), f = s.features;
  for (int64_t at = 0; at < queries; at += kWide) {
    Products({h.k.vectors, Padded(s.keys)}, s.keys, f, h.q.vectors + at, queries,
             [&](int64_t r, int i, V sum) { Store(h.weights + r * kWide + i * kLanes, sum); });
    V largest[kAcross], inverse[kAcross], dot[kAcross];
    Exponentials(s.keys, h.weights, largest, inverse);
    Products({h.v.vectors, Padded(s.keys)}, s.keys, f, h.dy.vectors + at, queries,
             [&](int64_t r, int i, V sum) { Store(h.slopes + r * kWide + i * kLanes, sum); });
    for (int i = 0; i < kAcross; ++i) {
      dot[i] = Zero();
      for (int64_t k = 0; k < s.keys; ++k) {
        const int64_t place = k * kWide + i * kLanes;
        const V weight = Mul(Load(h.weights + place), inverse[i]);
        Store(h.weights + place, weight);
        dot[i] = Fma(weight, Load(h.slopes + place), dot[i]);
      }
      for (int64_t k = 0; k < s.keys; ++k) {
        float* slope = h.slopes + k * kWide + i * kLanes;
        Store(slope, Mul(Load(h.weights + k * kWide + i * kLanes), Sub(Load(slope), dot[i])));
      }
      Store(h.largest + at + i * kLanes, largest[i]);
      Store(h.inverse + at + i * kLanes, inverse[i]);
      Store(h.dot + at + i * kLanes, dot[i]);
    }
    Products({h.k.rows, f}, f, s.keys, h.slopes, kWide,
             [&](int64_t r, int i, V sum) { Store(h.dq + r * queries + at + i * kLanes, Mul(sum, Set(s.scale))); });
  }
}

// With keys in the lanes: the gradients of keys and values.
void BackwardOfKeys(const AttentionSpec& s, const HeadOfBackward& h) {
  const int64_t keys = Padded(s.keys), f = s.features;
  for (int64_t at = 0; at < keys; at += kWide) {
    Products({h.q.vectors, Padded(s.queries)}, s.queries, f, h.k.vectors + at, keys, [&](int64_t r, int i, V score) {
      const V weight = Mul(Exp(Sub(score, Set(h.largest[r]))), Set(h.inverse[r]));
      Store(h.weights + r * kWide + i * kLanes, weight);
    });
    Products({h.dy.vectors, Padded(s.queries)}, s.queries, f, h.v.vectors + at, keys, [&](int64_t r, int i, V slope) {
      const int64_t place = r * kWide + i * kLanes;
      Store(h.slopes + place, Mul(Load(h.weights + place), Sub(slope, Set(h.dot[r]))));
    });
    Products({h.dy.rows, f}, f, s.queries, h.weights, kWide,
             [&](int64_t r, int i, V sum) { Store(h.dv + r * keys + at + i * kLanes, sum); });
    Products({h.q.rows, f}, f, s.queries, h.slopes, kWide,
             [&](int64_t r, int i, V sum) { Store(h.dk + r * keys + at + i * kLanes, sum); });
  }
}

void Backward(const LaneMap& query, const LaneMap& key, const LaneMap& value, const LaneMap& dy, const LaneMap* dquery,
              const LaneMap* dkey, const LaneMap* dvalue, const AttentionSpec& s, float* scratch, int threads) {
  ForHeads(s, true, scratch, threads, [&](int64_t picture, int64_t head, Memory memory) {
    const int64_t queries = Padded(s.queries), keys = Padded(s.keys), f = s.features;
    const auto both = [&](const LaneMap& map, const HeadPlaces& places, int64_t count, float factor) {
      const Both made = {memory.Take(f * Padded(count)), memory.Take(count * f)};
      const Tokens tokens(map, places, picture, head, count, f, &memory);
      tokens.ToVectors(factor, made.vectors);
      tokens.ToRows(factor, made.rows);
      return made;
    };
    HeadOfBackward h = {};
    h.q = both(query, s.query, s.queries, s.scale);
    h.k = both(key, s.key, s.keys, 1.0f);
    h.v = both(value, s.value, s.keys, 1.0f);
    h.dy = both(dy, s.seen, s.queries, 1.0f);
    h.largest = memory.Take(queries), h.inverse = memory.Take(queries), h.dot = memory.Take(queries);
    const int64_t longest = queries > keys ? queries : keys;
    h.weights = memory.Take(longest * kWide), h.slopes = memory.Take(longest * kWide);
    h.dq = memory.Take(f * queries), h.dk = memory.Take(f * keys), h.dv = memory.Take(f * keys);
    BackwardOfQueries(s, h);
    if (dquery) Tokens(*dquery, s.query, picture, head, s.queries, f, &memory).FromVectors(h.dq, true);
    if (!dkey && !dvalue) return;
    BackwardOfKeys(s, h);
    if (dkey) Tokens(*dkey, s.key, picture, head, s.keys, f, &memory).FromVectors(h.dk, true);
    if (dvalue) Tokens(*dvalue, s.value, picture, head, s.keys, f, &memory).FromVectors(h.dv, true);
  });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {Forward, Backward, Floats};

}  // namespace LIPFAST_NS
}  // namespace lipfast
