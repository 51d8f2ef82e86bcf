#include "cpu/attention.h"

#include <cstring>
#include <limits>

#include "cpu/activation.h"
#include "cpu/pool.h"
#include "cpu/products.h"
#include "cpu/tokens.h"

namespace lipfast {
namespace LIPFAST_NS {
namespace {

// Runs of heads that have memory of their own, and how much all of them take together.
constexpr int64_t kLeastChunks = 4, kMostChunks = 32, kMostFloats = 1 << 24;
constexpr int64_t kTogetherFloats = 1 << 18;  // of problems that are gathered at once: what a second level holds
constexpr int64_t kWide = int64_t{kAcross} * kLanes;

int64_t Padded(int64_t tokens) { return (tokens + kWide - 1) / kWide * kWide; }

float Sum(const float* numbers, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += numbers[i];
  return sum;
}

int64_t Longest(const AttentionSpec& s) { return Padded(s.queries > s.keys ? s.queries : s.keys); }

// What a problem takes: tokens as vectors and, of some, as rows.
int64_t ProblemFloats(const AttentionSpec& s, bool backward) {
  const int64_t tokens = (s.features + s.value_features) * (Padded(s.queries) + Padded(s.keys));
  return (backward ? 3 * tokens : tokens) + 53 * kLanes;  // with what rounding adds to each, and no multiple of a page
}

int64_t Together(const AttentionSpec& s, bool backward) {
  return kTogether * ProblemFloats(s, backward) <= kTogetherFloats ? s.together : 1;
}

// What a chunk takes: problems, scores, and numbers of tokens.
int64_t ChunkFloats(const AttentionSpec& s, bool backward) {
  const int64_t shared = backward ? (2 * kWide + 6) * Longest(s) : Padded(s.keys) * kWide + Longest(s);
  return Together(s, backward) * ProblemFloats(s, backward) + shared;
}

// As many as there are problems, unless they take too much memory.
int64_t Chunks(const AttentionSpec& s, bool backward) {
  const int64_t fitting = kMostFloats / ChunkFloats(s, backward);
  return AtMost(s.problems, fitting < kLeastChunks ? kLeastChunks : AtMost(fitting, kMostChunks));
}

int64_t Floats(const AttentionSpec& s, bool backward) { return Chunks(s, backward) * ChunkFloats(s, backward); }

// body(problems, memory of the first of them, memory of all) until all problems are done; `query` says which are
// gathered at once.
template <class Body>
void ForProblems(const AttentionSpec& s, const HeadMap& query, bool backward, float* scratch, int threads,
                 const Body& body) {
  const int64_t chunks = AtMost(Chunks(s, backward), s.runs), apart = ProblemFloats(s, backward);
  const int64_t together = Together(s, backward);
  const auto end = [&](int64_t chunk) { return chunk == 0 ? 0 : s.ends[chunk * s.runs / chunks - 1]; };
  ParallelFor(threads, chunks, [&](int64_t chunk) {
    float* memory = scratch + chunk * ChunkFloats(s, backward);
    for (int64_t i = end(chunk), count; i < end(chunk + 1); i += count) {
      const bool several = together > 1 && i + together <= end(chunk + 1);
      count = several && SideBySide(s.order + i, s.queries, query.at) ? together : 1;
      body(Problems{s.order + i, count, apart}, Memory{memory}, Memory{memory + together * apart});
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

// One head by vectors of tokens, and its values as rows of features.
struct HeadOfForward {
  float *q, *k, *v, *y;

  HeadOfForward(const AttentionSpec& s, Memory memory)
      : q(memory.Take(s.features * Padded(s.queries))),
        k(memory.Take(s.features * Padded(s.keys))),
        v(memory.Take(s.keys * s.value_features)),
        y(memory.Take(s.value_features * Padded(s.queries))) {}
};

// `memory`: of one problem after the other.
void ForwardOf(const AttentionSpec& s, int64_t problem, const HeadOfForward& h, Memory memory) {
  const int64_t queries = Padded(s.queries), keys = Padded(s.keys), of_value = s.value_features;
  float* scores = memory.Take(s.keys * kWide);
  const Biases biases = {s, problem};
  const V scale = Set(ScaleOf(s, problem));
  if (Cosines(s)) {
    float* lengths = memory.Take(Longest(s));
    Normalise(s, queries, h.q, lengths);
    Normalise(s, keys, h.k, lengths);
  }
  for (int64_t at = 0; at < queries; at += kWide) {
    Products<kAcross>({h.k, keys}, s.keys, s.features, h.q + at, queries, [&](int64_t r, int i, V sum) {
      Store(scores + r * kWide + i * kLanes, biases.Added(Mul(sum, scale), r, at + i * kLanes));
    });
    V largest[kAcross], inverse[kAcross];
    Exponentials(s, scores, largest, inverse);
    Products<kAcross>({h.v, of_value}, of_value, s.keys, scores, kWide, [&](int64_t r, int i, V sum) {
      Store(h.y + r * queries + at + i * kLanes, Mul(sum, inverse[i]));
    });
  }
}

constexpr float kUnscaled[kTogether] = {1, 1, 1, 1, 1, 1, 1, 1};

void Forward(const HeadMap& query, const HeadMap& key, const HeadMap& value, const HeadMap& seen,
             const AttentionSpec& s, float* scratch, int threads) {
  if (!Fill(s, seen.map)) Clear(seen.map, threads);
  ForProblems(s, query, false, scratch, threads, [&](const Problems& problems, Memory own, Memory shared) {
    const HeadOfForward first(s, own);
    const auto tokens = [&](const HeadMap& map, int64_t count, int64_t features) {
      return Tokens(map, problems, count, features);
    };
    tokens(query, s.queries, s.features).ToVectors(Padded(s.queries), first.q);
    tokens(key, s.keys, s.features).ToVectors(Padded(s.keys), first.k);
    tokens(value, s.keys, s.value_features).ToRows(first.v);
    for (int64_t i = 0; i < problems.count; ++i) {
      ForwardOf(s, problems.numbers[i], {s, {own.next + i * problems.apart}}, shared);
    }
    tokens(seen, s.queries, s.value_features).FromVectors<false>(kUnscaled, Padded(s.queries), first.y);
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
  Both q, k, v, dy;     // cosines: q and k are normalised
  float *dq, *dk, *dv;  // by vectors; those of q and k not yet scaled

  HeadOfBackward(const AttentionSpec& s, Memory memory) {
    const auto both = [&](int64_t count, int64_t features) {
      float* vectors = memory.Take(features * Padded(count));
      return Both{vectors, memory.Take(count * features)};
    };
    q = both(s.queries, s.features), k = both(s.keys, s.features);
    v = both(s.keys, s.value_features), dy = both(s.queries, s.value_features);
    dq = memory.Take(s.features * Padded(s.queries)), dk = memory.Take(s.features * Padded(s.keys));
    dv = memory.Take(s.value_features * Padded(s.keys));
  }
};

// What one problem needs after the other.
struct SharedOfBackward {
  float *q_lengths, *k_lengths;    // before normalising
  float *largest, *inverse, *dot;  // [queries]: of the softmax, and of its gradient
  float* along;                    // of queries or keys and their gradients
  float *weights, *slopes;         // of kWide tokens

  SharedOfBackward(const AttentionSpec& s, Memory memory) {
    const int64_t queries = Padded(s.queries), keys = Padded(s.keys);
    q_lengths = memory.Take(queries), k_lengths = memory.Take(keys);
    largest = memory.Take(queries), inverse = memory.Take(queries), dot = memory.Take(queries);
    along = memory.Take(Longest(s));
    weights = memory.Take(Longest(s) * kWide), slopes = memory.Take(Longest(s) * kWide);
  }
};

// With queries in the lanes: what the softmax and its gradient need of each query, and the gradient of the queries.
void BackwardOfQueries(const AttentionSpec& s, const Biases& biases, const HeadOfBackward& h,
                       const SharedOfBackward& w) {
  const int64_t queries = Padded(s.queries), f = s.features;
  const V scale = Set(ScaleOf(s, biases.problem));
  for (int64_t at = 0; at < queries; at += kWide) {
    Products<kAcross>({h.k.vectors, Padded(s.keys)}, s.keys, f, h.q.vectors + at, queries,
                      [&](int64_t r, int i, V sum) {
                        Store(w.weights + r * kWide + i * kLanes, biases.Added(Mul(sum, scale), r, at + i * kLanes));
                      });
    V largest[kAcross], inverse[kAcross], dot[kAcross];
    Exponentials(s, w.weights, largest, inverse);
    Products<kAcross>({h.v.vectors, Padded(s.keys)}, s.keys, s.value_features, h.dy.vectors + at, queries,
                      [&](int64_t r, int i, V sum) { Store(w.slopes + r * kWide + i * kLanes, sum); });
    for (int i = 0; i < kAcross; ++i) {
      dot[i] = Zero();
      for (int64_t k = 0; k < s.keys; ++k) {
        const int64_t place = k * kWide + i * kLanes;
        const V weight = Mul(Load(w.weights + place), inverse[i]);
        Store(w.weights + place, weight);
        dot[i] = Fma(weight, Load(w.slopes + place), dot[i]);
      }
      for (int64_t k = 0; k < s.keys; ++k) {
        float* slope = w.slopes + k * kWide + i * kLanes;
        Store(slope, Mul(Load(w.weights + k * kWide + i * kLanes), Sub(Load(slope), dot[i])));
      }
      Store(w.largest + at + i * kLanes, largest[i]);
      Store(w.inverse + at + i * kLanes, inverse[i]);
      Store(w.dot + at + i * kLanes, dot[i]);
    }
    biases.AddGradient(w.slopes, at);
    Products<kAcross>({h.k.rows, f}, f, s.keys, w.slopes, kWide,
                      [&](int64_t r, int i, V sum) { Store(h.dq + r * queries + at + i * kLanes, sum); });
  }
}

// With keys in the lanes: the gradients of keys and values.
void BackwardOfKeys(const AttentionSpec& s, const Biases& biases, const HeadOfBackward& h, const SharedOfBackward& w) {
  const int64_t keys = Padded(s.keys), f = s.features, of_value = s.value_features;
  const V scale = Set(ScaleOf(s, biases.problem));
  for (int64_t at = 0; at < keys; at += kWide) {
    Products<kAcross>({h.q.vectors, Padded(s.queries)}, s.queries, f, h.k.vectors + at, keys,
                      [&](int64_t r, int i, V sum) {
                        const V score = biases.AddedAcross(Mul(sum, scale), r, at + i * kLanes);
                        const V weight = Mul(Exp(Sub(score, Set(w.largest[r]))), Set(w.inverse[r]));
                        Store(w.weights + r * kWide + i * kLanes, weight);
                      });
    const auto slope_of = [&](int64_t r, int i, V sum) {
      const int64_t place = r * kWide + i * kLanes;
      Store(w.slopes + place, Mul(Load(w.weights + place), Sub(sum, Set(w.dot[r]))));
    };
    Products<kAcross>({h.dy.vectors, Padded(s.queries)}, s.queries, of_value, h.v.vectors + at, keys, slope_of);
    Products<kAcross>({h.dy.rows, of_value}, of_value, s.queries, w.weights, kWide,
                      [&](int64_t r, int i, V sum) { Store(h.dv + r * keys + at + i * kLanes, sum); });
    Products<kAcross>({h.q.rows, f}, f, s.queries, w.slopes, kWide,
                      [&](int64_t r, int i, V sum) { Store(h.dk + r * keys + at + i * kLanes, sum); });
  }
}

// The gradients of one problem, not yet scaled.
void BackwardOf(const AttentionSpec& s, int64_t problem, bool of_keys, const HeadOfBackward& h,
                const SharedOfBackward& w) {
  const int64_t queries = Padded(s.queries), keys = Padded(s.keys), f = s.features;
  if (Cosines(s)) {
    NormaliseBoth(s, s.queries, h.q, w.q_lengths);
    NormaliseBoth(s, s.keys, h.k, w.k_lengths);
  }
  const Biases biases = {s, problem};
  BackwardOfQueries(s, biases, h, w);
  if (s.factor_gradient || Cosines(s)) TokenProducts(h.q.vectors, h.dq, f, queries, w.along);
  if (s.factor_gradient) s.factor_gradient[problem] = s.scale * Sum(w.along, s.queries);
  if (Cosines(s)) NormaliseBackward(s, queries, h.q.vectors, w.q_lengths, w.along, h.dq);
  if (!of_keys) return;
  BackwardOfKeys(s, biases, h, w);
  if (!Cosines(s)) return;
  TokenProducts(h.k.vectors, h.dk, f, keys, w.along);
  NormaliseBackward(s, keys, h.k.vectors, w.k_lengths, w.along, h.dk);
}

void Backward(const HeadMap& query, const HeadMap& key, const HeadMap& value, const HeadMap& dy, const HeadMap* dquery,
              const HeadMap* dkey, const HeadMap* dvalue, const AttentionSpec& s, float* scratch, int threads) {
  for (const ScoreBias* b = s.biases; b < s.biases + s.bias_count; ++b) {
    if (b->gradient) std::memset(b->gradient, 0, b->count * s.keys * BiasWidth(s.queries) * sizeof(float));
  }
  ForProblems(s, query, true, scratch, threads, [&](const Problems& problems, Memory own, Memory shared) {
    const HeadOfBackward first(s, own);
    const auto gather = [&](const HeadMap& map, int64_t count, int64_t features, const Both& head) {
      const Tokens tokens(map, problems, count, features);
      tokens.ToVectors(Padded(count), head.vectors);
      tokens.ToRows(head.rows);
    };
    gather(query, s.queries, s.features, first.q);
    gather(key, s.keys, s.features, first.k);
    gather(value, s.keys, s.value_features, first.v);
    gather(dy, s.queries, s.value_features, first.dy);
    float scales[kTogether];
    for (int64_t i = 0; i < problems.count; ++i) {
      scales[i] = ScaleOf(s, problems.numbers[i]);
      const HeadOfBackward head(s, {own.next + i * problems.apart});
      BackwardOf(s, problems.numbers[i], dkey || dvalue, head, SharedOfBackward(s, shared));
    }
    const auto add = [&](const HeadMap* map, const float* factors, int64_t count, int64_t features, const float* from) {
      if (map) Tokens(*map, problems, count, features).FromVectors<true>(factors, Padded(count), from);
    };
    add(dquery, scales, s.queries, s.features, first.dq);
    add(dkey, scales, s.keys, s.features, first.dk);
    add(dvalue, kUnscaled, s.keys, s.value_features, first.dv);
  });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {Forward, Backward, Floats};

}  // namespace LIPFAST_NS
}  // namespace lipfast
