// Softmax attention on rows of features: maps of one item whose pixels are tokens.
//
// A picture's tokens are gathered into vectors, sixteen to one, head by head: then a score is a number of a key times
// vectors of queries, the softmax runs along vectors and never across their lanes, and what a query sees is weights
// times numbers of the values. Backward computes the scores again, and once more with keys in the lanes for the
// gradients that are sums over queries.
//
// Source: A. Vaswani et al., "Attention Is All You Need", 2017; that no score needs be kept: T. Dao et al.,
// "FlashAttention", 2022.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace lipfast {

// Where a map has the tokens of each head: number `first + head * apart + f` is feature f's channel, and
// `picture * of_picture + token * of_token` the pixel.
struct HeadPlaces {
  int64_t first, apart, of_picture, of_token;
};

struct AttentionSpec {
  int64_t pictures, heads, features, queries, keys;
  float scale;  // of the scores
  HeadPlaces query, key, value, seen;
};

struct AttentionKernels {
  // seen = softmax(scale * query key^T) value for each picture and head. Maps have one sheet; what `seen` has beside
  // its tokens becomes zero. `scratch`, 64-byte aligned, holds floats(spec, false).
  void (*forward)(const LaneMap& query, const LaneMap& key, const LaneMap& value, const LaneMap& seen,
                  const AttentionSpec& spec, float* scratch, int threads);
  // Adds the gradients for dy at `seen`; each of the three may be null. `scratch` holds floats(spec, true).
  void (*backward)(const LaneMap& query, const LaneMap& key, const LaneMap& value, const LaneMap& dy,
                   const LaneMap* dquery, const LaneMap* dkey, const LaneMap* dvalue, const AttentionSpec& spec,
                   float* scratch, int threads);
  int64_t (*floats)(const AttentionSpec& spec, bool backward);
};

}  // namespace lipfast
