// Tokens of heads, gathered from maps into memory of their own, and put back; for kernel sources only.
//
// Tokens that lie side by side in a map, as those of a whole picture do in the map's order, are copied vectors at a
// time. Those of windows do not, but the same token of neighbouring windows often does, in neighbouring lanes: then
// kTogether problems are gathered at once, and transposes set them apart.
#pragma once

#include <cstring>

#include "cpu/attention.h"
#include "cpu/transpose.h"

namespace lipfast {
namespace LIPFAST_NS {

// Memory that is handed out piece by piece, each on a line of the cache.
struct Memory {
  float* next;

  float* Take(int64_t floats) {
    float* taken = next;
    next += RoundUp(floats);
    return taken;
  }
  static int64_t RoundUp(int64_t floats) { return (floats + kLanes - 1) / kLanes * kLanes; }
};

// Problems that are worked on one after the other with their tokens gathered at once. Their memory lies `apart`.
struct Problems {
  const int64_t* numbers;
  int64_t count, apart;
};

// The tokens of one problem or of several in a map.
class Tokens {
 public:
  Tokens(const HeadMap& heads, const Problems& problems, int64_t count, int64_t features)
      : data_(heads.map.data),
        plane_(heads.map.channel_stride),
        apart_(problems.apart),
        problems_(problems.count),
        count_(count),
        features_(features),
        runs_((problems.count == 1 ? heads.runs : heads.steps) + problems.numbers[0] * count),
        alone_(problems.count == 1 && runs_[0] == 0) {
    for (int64_t i = 0; i < problems_; ++i) at_[i] = heads.at + problems.numbers[i] * count;
  }

  // [features][padded], zeros behind the last token.
  void ToVectors(int64_t padded, float* to) const {
    if (problems_ == 1) return OneToVectors(padded, to);
    for (int64_t t = 0; t < padded; t += kTogether) {
      const Lines lines(*this, t);
      for (int64_t f = 0; f < features_; ++f) {
        Square square;
        for (int64_t i = 0; i < kTogether; ++i) {
          square.from[i] = lines.Of(f, i, square.made[i]);
          square.to[i] = to + f * padded + i * apart_ + t;
        }
        square.Turn();
      }
    }
  }

  // [count][features], a line of the cache at a time
  void ToRows(float* to) const {
    constexpr int64_t kLine = 16;  // floats
    for (int64_t f = 0; f < features_; f += kLine) {
      const int64_t last = AtMost(f + kLine, features_), few = (last - f) % kTogether;
      for (int64_t t = 0, next; t < count_; t = next) {
        next = alone_ ? count_ : problems_ == 1 ? t + runs_[t] : t + 1;
        const bool squares = few == 0 && !alone_ && (problems_ == 1 ? next - t >= kTogether : runs_[t] != 0);
        for (int64_t c = f; c < last && squares; c += kTogether) SquaresToRows(t, next, c, to);
        if (!squares) OneByOne(t, next, f, last, to);
      }
    }
  }

  // The reverse of ToVectors: each problem's times its factor, added or put there.
  template <bool kAdd>
  void FromVectors(const float* factors, int64_t padded, const float* from) const {
    if (problems_ == 1) return OneFromVectors<kAdd>(factors[0], padded, from);
    for (int64_t t = 0; t < count_; t += kTogether) {
      for (int64_t f = 0; f < features_; ++f) {
        Square square;
        for (int64_t i = 0; i < kTogether; ++i) {
          square.from[i] = from + f * padded + i * apart_ + t;
          square.to[i] = square.made[i];
        }
        square.Turn();
        for (int64_t i = 0; i < AtMost(kTogether, count_ - t); ++i) PutToken<kAdd>(factors, square.made[i], f, t + i);
      }
    }
  }

 private:
  // Eight rows of eight, and their transpose.
  struct Square {
    const float* from[kTogether];
    float* to[kTogether];
    alignas(32) float made[kTogether][kTogether];

    void Turn() const { Transpose8(from, to); }
  };

  // Of all problems, eight tokens: where they lie, if side by side.
  struct Lines {
    const Tokens& tokens;
    int64_t first;
    const float* at[kTogether];

    Lines(const Tokens& tokens, int64_t first) : tokens(tokens), first(first) {
      for (int64_t i = 0; i < kTogether; ++i) {
        const int64_t t = first + i;
        at[i] = t < tokens.count_ && tokens.runs_[t] ? tokens.data_ + tokens.at_[0][t] : nullptr;
      }
    }

    // A feature of one of them, gathered into `made` if it has to be; zeros where there is no token.
    const float* Of(int64_t feature, int64_t i, float* made) const {
      if (at[i]) return at[i] + feature * tokens.plane_;
      for (int64_t problem = 0; problem < kTogether; ++problem) {
        made[problem] =
            first + i < tokens.count_ ? tokens.data_[feature * tokens.plane_ + tokens.at_[problem][first + i]] : 0.0f;
      }
      return made;
    }
  };

  void OneToVectors(int64_t padded, float* to) const {
    for (int64_t f = 0; f < features_; ++f, to += padded) {
      const float* plane = data_ + f * plane_;
      const int64_t* at = at_[0];
      if (alone_) {
        for (int64_t t = 0; t < count_; ++t) to[t] = plane[at[t]];
      } else {
        for (int64_t t = 0; t < count_; t += runs_[t]) std::memcpy(to + t, plane + at[t], runs_[t] * sizeof(float));
      }
      for (int64_t t = count_; t < padded; ++t) to[t] = 0.0f;
    }
  }

  template <bool kAdd>
  void OneFromVectors(float factor, int64_t padded, const float* from) const {
    for (int64_t f = 0; f < features_; ++f, from += padded) {
      float* plane = data_ + f * plane_;
      const int64_t* at = at_[0];
      if (alone_) {
        for (int64_t t = 0; t < count_; ++t) Put<kAdd>(plane + at[t], factor * from[t]);
        continue;
      }
      for (int64_t t = 0; t < count_; t += runs_[t]) {
        for (int64_t i = 0; i < runs_[t]; ++i) Put<kAdd>(plane + at[t] + i, factor * from[t + i]);
      }
    }
  }

  template <bool kAdd>
  static void Put(float* to, float number) {
    *to = kAdd ? *to + number : number;
  }

  template <bool kAdd>
  void PutToken(const float* factors, const float* from, int64_t feature, int64_t token) const {
    float* plane = data_ + feature * plane_;
    if (runs_[token]) {
      for (int64_t i = 0; i < kTogether; ++i) Put<kAdd>(plane + at_[0][token] + i, factors[i] * from[i]);
    } else {
      for (int64_t i = 0; i < kTogether; ++i) Put<kAdd>(plane + at_[i][token], factors[i] * from[i]);
    }
  }

  // Eight features of the tokens [t, next): of a run of one problem's, or of one token of all problems.
  void SquaresToRows(int64_t t, int64_t next, int64_t f, float* to) const {
    const int64_t apart = problems_ == 1 ? features_ : apart_;
    for (; t < next; t += kTogether) {
      if (problems_ == 1) t = AtMost(t, next - kTogether);  // the last ones may be done twice
      Square square;
      for (int64_t i = 0; i < kTogether; ++i) {
        square.from[i] = data_ + (f + i) * plane_ + at_[0][t];
        square.to[i] = to + t * features_ + i * apart + f;
      }
      square.Turn();
    }
  }

  // The features [f, last) of the tokens [t, next) of each problem.
  void OneByOne(int64_t t, int64_t next, int64_t f, int64_t last, float* to) const {
    for (int64_t i = 0; i < problems_; ++i) {
      for (int64_t token = t; token < next; ++token) {
        const float* from = data_ + at_[i][token];
        float* row = to + i * apart_ + token * features_;
        for (int64_t c = f; c < last; ++c) row[c] = from[c * plane_];
      }
    }
  }

  float* data_;
  int64_t plane_, apart_, problems_, count_, features_;
  const int32_t* runs_;           // of one problem HeadMap's runs, of several its steps
  bool alone_;                    // of one: each token is moved alone
  const int64_t* at_[kTogether];  // of each problem
};

}  // namespace LIPFAST_NS
}  // namespace lipfast
