// Softmax attention of heads, whose tokens are pixels of maps.
//
// A problem is one head of one picture, or of one window of it: where its tokens lie is a list, so whatever is cut
// apart, rolled or transposed before is not moved. Its tokens are gathered into vectors, sixteen to one: then a score
// is a number of a key times vectors of queries, the softmax runs along vectors and never across their lanes, and what
// a query sees is weights times numbers of the values. Backward computes the scores again, and once more with keys in
// the lanes for the gradients that are sums over queries. Tokens of cosines are normalised where they were gathered,
// and so are their gradients.
//
// Source: A. Vaswani et al., "Attention Is All You Need", 2017; that no score needs be kept: T. Dao et al.,
// "FlashAttention", 2022.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace lipfast {

// A map and, for each problem and token, the place of the first feature among its floats; cpu/heads.h makes the lists.
struct HeadMap {
  LaneMap map;
  const int64_t* at;     // [problems][tokens]
  const int32_t* runs;   // so many of the problem's tokens lie side by side from this one on; 0: most lie alone
  const int32_t* steps;  // whether the same token of the next kTogether problems, in order, lies side by side
};

constexpr int64_t kTogether = 8;  // problems whose tokens are gathered at once, if not one

// Whether kTogether problems' first tokens lie side by side.
bool SideBySide(const int64_t* problems, int64_t tokens, const int64_t* at);

// What is added to scores, as rows of [keys][BiasWidth(queries)]: position biases, masks.
struct ScoreBias {
  const float* scores;
  const int32_t* rows;  // [problems]: which of them
  int64_t count;        // of rows
  float* gradient;      // overwritten; null: not wanted
};

// Queries and what fills the last vectors.
constexpr int64_t BiasWidth(int64_t queries) { return (queries + 31) / 32 * 32; }

struct AttentionSpec {
  int64_t problems, features, value_features, queries, keys;  // features: of a query or key
  float scale;                                                // of the scores
  // [problems]: of the scores, too, and their gradient, which is overwritten. Null: none, not wanted.
  const float* factors;
  float* factor_gradient;
  // Scores are cosines: queries and keys are divided by their lengths, or by this where it is larger. Below 0: they are
  // not.
  float epsilon;
  bool safe;  // a query that no key may answer sees zeros, not NaN
  const ScoreBias* biases;
  int64_t bias_count;
  // As `ProblemRuns`: problems that add to the same row of a gradient are one run.
  const int64_t *order, *ends;
  int64_t runs, together;
};

struct AttentionKernels {
  // seen = softmax(scale * factor * query key^T + biases) value for each problem. What `seen` has beside its tokens
  // becomes zero. `scratch`, 64-byte aligned, holds floats(spec, false).
  void (*forward)(const HeadMap& query, const HeadMap& key, const HeadMap& value, const HeadMap& seen,
                  const AttentionSpec& spec, float* scratch, int threads);
  // Adds the gradients for dy at `seen`; each of the three may be null. `scratch` holds floats(spec, true).
  void (*backward)(const HeadMap& query, const HeadMap& key, const HeadMap& value, const HeadMap& dy,
                   const HeadMap* dquery, const HeadMap* dkey, const HeadMap* dvalue, const AttentionSpec& spec,
                   float* scratch, int threads);
  int64_t (*floats)(const AttentionSpec& spec, bool backward);
};

}  // namespace lipfast
