#include "cpu/attention.h"

#include <cstring>
#include <limits>

#include "cpu/activation.h"
#include "cpu/pool.h"
#include "cpu/products.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// Runs of heads that have memory of their own, and how much all of them take together.
constexpr int64_t kLeastChunks = 4, kMostChunks = 32, kMostFloats = 1 << 24;
constexpr int64_t kWide = int64_t{kAcross} * kLanes;

int64_t Padded(int64_t tokens) { return (tokens + kWide - 1) / kWide * kWide; }

// Memory of one chunk, handed out piece by piece.
struct Memory {
  float* next;
  float* Take(int64_t floats) {
    float* taken = next;
    next += (floats + kLanes - 1) / kLanes * kLanes;
    return taken;
  }
};

float Sum(const float* numbers, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += numbers[i];
  return sum;
}

constexpr int64_t kLine = 16;  // floats

// The tokens of a problem in a map.
struct Tokens {
  float* data;        // of channel 0
  const int64_t* at;  // of each token's first feature
  int64_t apart;      // from a feature to the next
  int64_t count, features;

  Tokens(const HeadMap& heads, int64_t problem, int64_t count, int64_t features)
      : data(heads.map.data),
        at(heads.at + problem * count),
        apart(heads.map.channel_stride),
        count(count),
        features(features) {}

  // [features][Padded(count)], zeros behind the last token
  void ToVectors(float* to) const {
    for (int64_t f = 0; f < features; ++f, to += Padded(count)) {
      const float* from = data + f * apart;
      for (int64_t token = 0; token < count; ++token) to[token] = from[at[token]];
      for (int64_t token = count; token < Padded(count); ++token) to[token] = 0.0f;
    }
  }

  // [count][features], a line of the cache at a time
  void ToRows(float* to) const {
    for (int64_t first = 0; first < features; first += kLine) {
      const int64_t last = AtMost(first + kLine, features);
      for (int64_t token = 0; token < count; ++token) {
        const float* from = data + at[token];
        for (int64_t f = first; f < last; ++f) to[token * features + f] = from[f * apart];
      }
    }
  }

  // The reverse of ToVectors, times a factor, put there or added.
  void FromVectors(float factor, const float* from, bool add) const {
    for (int64_t f = 0; f < features; ++f, from += Padded(count)) {
      float* to = data + f * apart;
      for (int64_t token = 0; token < count; ++token) {
        float& there = to[at[token]];
        there = add ? there + factor * from[token] : factor * from[token];
      }
    }
  }
};

int64_t Longest(const AttentionSpec& s) { return Padded(s.queries > s.keys ? s.queries : s.keys); }

// What a chunk takes: tokens as vectors and as rows, scores, and numbers of tokens.
int64_t ChunkFloats(const AttentionSpec& s, bool backward) {
  const int64_t queries = Padded(s.queries), keys = Padded(s.keys), longest = Longest(s);
  const int64_t tokens = (s.features + s.value_features) * (queries + keys);
  const int64_t pieces = 32 * kLanes;  // what rounding adds to each
  return (backward ? 3 * tokens + 2 * longest * kWide + 6 * longest : tokens + keys * kWide + longest) + pieces;
}

// As many as there are problems, unless they take too much memory.
int64_t Chunks(const AttentionSpec& s, bool backward) {
  const int64_t fitting = kMostFloats / ChunkFloats(s, backward);
  return AtMost(s.problems, fitting < kLeastChunks ? kLeastChunks : AtMost(fitting, kMostChunks));
}

int64_t Floats(const AttentionSpec& s, bool backward) { return Chunks(s, backward) * ChunkFloats(s, backward); }

// body(problem, memory) for all problems
template <class Body>
void ForProblems(const AttentionSpec& s, bool backward, float* scratch, int threads, const Body& body) {
  const int64_t chunks = AtMost(Chunks(s, backward), s.runs);
  const auto end = [&](int64_t chunk) { return chunk == 0 ? 0 : s.ends[chunk * s.runs / chunks - 1]; };
  ParallelFor(threads, chunks, [&](int64_t chunk) {
    for (int64_t i = end(chunk); i < end(chunk + 1); ++i) {
      body(s.order[i], Memory{scratch + chunk * ChunkFloats(s, backward)});
    }
  });
}

// What a problem's products of queries and keys are multiplied by.
float ScaleOf(const AttentionSpec& s, int64_t problem) { return s.factors ? s.scale * s.factors[problem] : s.scale; }

// products[token] = sum over features of a * b, of vectors [features][tokens]
void TokenProducts(const float* a, const float* b, int64_t features, int64_t tokens, float* products) {
  for (int64_t at = 0; at < tokens; at += kLanes) {
    V sum = Zero();
    for (int64_t f = 0; f < features; ++f) sum = Fma(Load(a + f * tokens + at), Load(b + f * tokens + at), sum);
    Store(products + at, sum);
  }
}

bool Cosines(const AttentionSpec& s) { return s.epsilon >= 0; }

// 1 / what tokens of these lengths are divided by; NaN stays NaN.
V InverseLengths(const AttentionSpec& s, const float* lengths) {
  return Div(Set(1.0f), Max(Set(s.epsilon), Load(lengths)));
}

// Divides tokens, by vectors [features][tokens], by their `lengths`, which are written.
void Normalise(const AttentionSpec& s, int64_t tokens, float* vectors, float* lengths) {
  TokenProducts(vectors, vectors, s.features, tokens, lengths);
  for (int64_t at = 0; at < tokens; at += kLanes) {
    Store(lengths + at, Sqrt(Load(lengths + at)));
    const V inverse = InverseLengths(s, lengths + at);
    for (int64_t i = at; i < s.features * tokens; i += tokens) Store(vectors + i, Mul(Load(vectors + i), inverse));
  }
}

// Makes gradients of normalised tokens those of the tokens before; `along`: the products of both.
void NormaliseBackward(const AttentionSpec& s, int64_t tokens, const float* vectors, const float* lengths,
                       const float* along, float* gradients) {
  for (int64_t at = 0; at < tokens; at += kLanes) {
    // Shorter ones were divided by a constant.
    const V across = IfPositive(Sub(Set(s.epsilon), Load(lengths + at)), Zero(), Load(along + at));
    const V inverse = InverseLengths(s, lengths + at);
    for (int64_t i = at; i < s.features * tokens; i += tokens) {
      Store(gradients + i, Mul(Sub(Load(gradients + i), Mul(across, Load(vectors + i))), inverse));
    }
  }
}

// The rows of biases that a problem adds to its scores.
struct Biases {
  const AttentionSpec& s;
  int64_t problem;

  int64_t width() const { return BiasWidth(s.queries); }
  int64_t Row(const ScoreBias& bias) const { return bias.rows[problem] * s.keys * width(); }

  // A score of key `k` and queries from `at` on, with queries in the lanes.
  V Added(V score, int64_t k, int64_t at) const {
    for (const ScoreBias* b = s.biases; b < s.biases + s.bias_count; ++b) {
      score = Add(score, Load(b->scores + Row(*b) + k * width() + at));
    }
    return score;
  }

  // The same of query `q` and keys from `at` on, with keys in the lanes.
  V AddedAcross(V score, int64_t q, int64_t at) const {
    for (const ScoreBias* b = s.biases; b < s.biases + s.bias_count; ++b) {
      const float* from = b->scores + Row(*b) + at * width() + q;
      alignas(64) float found[kLanes] = {};
      for (int64_t i = 0; i < AtMost(kLanes, s.keys - at); ++i) found[i] = from[i * width()];
      score = Add(score, Load(found));
    }
    return score;
  }

  void AddGradient(const float* slopes, int64_t at) const {
    for (const ScoreBias* b = s.biases; b < s.biases + s.bias_count; ++b) {
      for (int64_t k = 0; b->gradient && k < s.keys; ++k) {
        float* to = b->gradient + Row(*b) + k * width() + at;
        for (int i = 0; i < kAcross; ++i) {
          Store(to + i * kLanes, Add(Load(to + i * kLanes), Load(slopes + k * kWide + i * kLanes)));
        }
      }
    }
  }
};

// Of scores [keys][kWide]: their softmax, but for the division by the sums. Gives the largest ones and 1 / sum; where
// all are -inf, finite ones and NaN or zero.
void Exponentials(const AttentionSpec& s, float* scores, V* largest, V* inverse) {
  const int64_t keys = s.keys;
  const V of_none = Set(s.safe ? 0.0f : std::numeric_limits<float>::quiet_NaN());
  for (int i = 0; i < kAcross; ++i) {
    V most = Load(scores + i * kLanes);
    for (int64_t k = 1; k < keys; ++k) most = Max(most, Load(scores + k * kWide + i * kLanes));
    const V finite = Max(most, Set(-std::numeric_limits<float>::max()));
    V sum = Zero();
    for (int64_t k = 0; k < keys; ++k) {
      float* at = scores + k * kWide + i * kLanes;
      const V e = Exp(Sub(Load(at), finite));
      Store(at, e);
      sum = Add(sum, e);
    }
    largest[i] = finite;
    inverse[i] = IfPositive(Sub(finite, most), of_none, Div(Set(1.0f), sum));
  }
}

// Whether a spec's tokens are all that a map has.
bool Fill(const AttentionSpec& s, const LaneMap& map) {
  return map.whole() && !map.missing && s.problems * s.queries * s.value_features == map.channels * map.pixels();
}

void Clear(const LaneMap& map, int threads) {
  ParallelFor(threads, map.batch * map.channels, [&](int64_t plane) {
    for (int64_t row = 0; row < map.block_h; ++row) {
      std::memset(map.At(plane / map.channels, plane % map.channels, row), 0, map.block_w * kLanes * sizeof(float));
    }
  });
}

void Forward(const HeadMap& query, const HeadMap& key, const HeadMap& value, const HeadMap& seen,
             const AttentionSpec& s, float* scratch, int threads) {
  if (!Fill(s, seen.map)) Clear(seen.map, threads);
  ForProblems(s, false, scratch, threads, [&](int64_t problem, Memory memory) {
    const int64_t queries = Padded(s.queries), keys = Padded(s.keys), f = s.features, of_value = s.value_features;
    float *q = memory.Take(f * queries), *k = memory.Take(f * keys), *v = memory.Take(s.keys * of_value);
    float *y = memory.Take(of_value * queries), *scores = memory.Take(s.keys * kWide);
    const Biases biases = {s, problem};
    const V scale = Set(ScaleOf(s, problem));
    Tokens(query, problem, s.queries, f).ToVectors(q);
    Tokens(key, problem, s.keys, f).ToVectors(k);
    Tokens(value, problem, s.keys, of_value).ToRows(v);
    if (Cosines(s)) {
      float* lengths = memory.Take(Longest(s));
      Normalise(s, queries, q, lengths);
      Normalise(s, keys, k, lengths);
    }
    for (int64_t at = 0; at < queries; at += kWide) {
      Products<kAcross>({k, keys}, s.keys, f, q + at, queries, [&](int64_t r, int i, V sum) {
        Store(scores + r * kWide + i * kLanes, biases.Added(Mul(sum, scale), r, at + i * kLanes));
      });
      V largest[kAcross], inverse[kAcross];
      Exponentials(s, scores, largest, inverse);
      Products<kAcross>({v, of_value}, of_value, s.keys, scores, kWide, [&](int64_t r, int i, V sum) {
        Store(y + r * queries + at + i * kLanes, Mul(sum, inverse[i]));
      });
    }
    Tokens(seen, problem, s.queries, of_value).FromVectors(1.0f, y, false);
  });
}

// One head, as vectors of tokens [features][padded tokens] and as rows of features [tokens][features].
struct Both {
  float *vectors, *rows;
};

// Divides the tokens of a head by their lengths, which are written.
void NormaliseBoth(const AttentionSpec& s, int64_t count, const Both& head, float* lengths) {
  Normalise(s, Padded(count), head.vectors, lengths);
  for (int64_t token = 0; token < count; ++token) {
    for (int64_t f = 0; f < s.features; ++f) {
      head.rows[token * s.features + f] = head.vectors[f * Padded(count) + token];
    }
  }
}

struct HeadOfBackward {
  float scale;
  Both q, k, v, dy;                        // cosines: q and k are normalised
  float *q_lengths, *k_lengths;            // before that
  float *largest, *inverse, *dot;          // [queries]: of the softmax, and of its gradient
  float* along;                            // of queries or keys and their gradients
  float *weights, *slopes, *dq, *dk, *dv;  // of kWide tokens; gradients by vectors, those of q and k not yet scaled
};

// With queries in the lanes: what the softmax and its gradient need of each query, and the gradient of the queries.
void BackwardOfQueries(const AttentionSpec& s, const Biases& biases, const HeadOfBackward& h) {
  const int64_t queries = Padded(s.queries), f = s.features;
  const V scale = Set(h.scale);
  for (int64_t at = 0; at < queries; at += kWide) {
    Products<kAcross>({h.k.vectors, Padded(s.keys)}, s.keys, f, h.q.vectors + at, queries,
                      [&](int64_t r, int i, V sum) {
                        Store(h.weights + r * kWide + i * kLanes, biases.Added(Mul(sum, scale), r, at + i * kLanes));
                      });
    V largest[kAcross], inverse[kAcross], dot[kAcross];
    Exponentials(s, h.weights, largest, inverse);
    Products<kAcross>({h.v.vectors, Padded(s.keys)}, s.keys, s.value_features, h.dy.vectors + at, queries,
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
    biases.AddGradient(h.slopes, at);
    Products<kAcross>({h.k.rows, f}, f, s.keys, h.slopes, kWide,
                      [&](int64_t r, int i, V sum) { Store(h.dq + r * queries + at + i * kLanes, sum); });
  }
}

// With keys in the lanes: the gradients of keys and values.
void BackwardOfKeys(const AttentionSpec& s, const Biases& biases, const HeadOfBackward& h) {
  const int64_t keys = Padded(s.keys), f = s.features, of_value = s.value_features;
  const V scale = Set(h.scale);
  for (int64_t at = 0; at < keys; at += kWide) {
    Products<kAcross>({h.q.vectors, Padded(s.queries)}, s.queries, f, h.k.vectors + at, keys,
                      [&](int64_t r, int i, V sum) {
                        const V score = biases.AddedAcross(Mul(sum, scale), r, at + i * kLanes);
                        const V weight = Mul(Exp(Sub(score, Set(h.largest[r]))), Set(h.inverse[r]));
                        Store(h.weights + r * kWide + i * kLanes, weight);
                      });
    const auto slope_of = [&](int64_t r, int i, V sum) {
      const int64_t place = r * kWide + i * kLanes;
      Store(h.slopes + place, Mul(Load(h.weights + place), Sub(sum, Set(h.dot[r]))));
    };
    Products<kAcross>({h.dy.vectors, Padded(s.queries)}, s.queries, of_value, h.v.vectors + at, keys, slope_of);
    Products<kAcross>({h.dy.rows, of_value}, of_value, s.queries, h.weights, kWide,
                      [&](int64_t r, int i, V sum) { Store(h.dv + r * keys + at + i * kLanes, sum); });
    Products<kAcross>({h.q.rows, f}, f, s.queries, h.slopes, kWide,
                      [&](int64_t r, int i, V sum) { Store(h.dk + r * keys + at + i * kLanes, sum); });
  }
}

void Backward(const HeadMap& query, const HeadMap& key, const HeadMap& value, const HeadMap& dy, const HeadMap* dquery,
              const HeadMap* dkey, const HeadMap* dvalue, const AttentionSpec& s, float* scratch, int threads) {
  for (const ScoreBias* b = s.biases; b < s.biases + s.bias_count; ++b) {
    if (b->gradient) std::memset(b->gradient, 0, b->count * s.keys * BiasWidth(s.queries) * sizeof(float));
  }
  ForProblems(s, true, scratch, threads, [&](int64_t problem, Memory memory) {
    const int64_t queries = Padded(s.queries), keys = Padded(s.keys), f = s.features, of_value = s.value_features;
    const auto both = [&](const HeadMap& map, int64_t count, int64_t features) {
      const Both made = {memory.Take(features * Padded(count)), memory.Take(count * features)};
      const Tokens tokens(map, problem, count, features);
      tokens.ToVectors(made.vectors);
      tokens.ToRows(made.rows);
      return made;
    };
    HeadOfBackward h = {};
    h.scale = ScaleOf(s, problem);
    h.q = both(query, s.queries, f);
    h.k = both(key, s.keys, f);
    h.v = both(value, s.keys, of_value);
    h.dy = both(dy, s.queries, of_value);
    h.q_lengths = memory.Take(queries), h.k_lengths = memory.Take(keys);
    h.largest = memory.Take(queries), h.inverse = memory.Take(queries), h.dot = memory.Take(queries);
    h.along = memory.Take(Longest(s));
    h.weights = memory.Take(Longest(s) * kWide), h.slopes = memory.Take(Longest(s) * kWide);
    h.dq = memory.Take(f * queries), h.dk = memory.Take(f * keys), h.dv = memory.Take(of_value * keys);
    if (Cosines(s)) {
      NormaliseBoth(s, s.queries, h.q, h.q_lengths);
      NormaliseBoth(s, s.keys, h.k, h.k_lengths);
    }
    const Biases biases = {s, problem};
    BackwardOfQueries(s, biases, h);
    if (s.factor_gradient || Cosines(s)) TokenProducts(h.q.vectors, h.dq, f, queries, h.along);
    if (s.factor_gradient) s.factor_gradient[problem] = s.scale * Sum(h.along, s.queries);
    if (Cosines(s)) NormaliseBackward(s, queries, h.q.vectors, h.q_lengths, h.along, h.dq);
    if (dquery) Tokens(*dquery, problem, s.queries, f).FromVectors(h.scale, h.dq, true);
    if (!dkey && !dvalue) return;
    BackwardOfKeys(s, biases, h);
    if (Cosines(s)) {
      TokenProducts(h.k.vectors, h.dk, f, keys, h.along);
      NormaliseBackward(s, keys, h.k.vectors, h.k_lengths, h.along, h.dk);
    }
    if (dkey) Tokens(*dkey, problem, s.keys, f).FromVectors(h.scale, h.dk, true);
    if (dvalue) Tokens(*dvalue, problem, s.keys, of_value).FromVectors(1.0f, h.dv, true);
  });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {Forward, Backward, Floats};

}  // namespace LIPFAST_NS
}  // namespace lipfast
