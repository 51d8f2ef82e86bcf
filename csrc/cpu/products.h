// Sums of numbers times vectors, a few rows of them at a time; for kernel sources only.
#pragma once

#include "cpu/lanes.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

constexpr int kAcross = kRegisters >= 32 ? 2 : 1;  // vectors that are worked on together
constexpr int kRows = kRegisters >= 32 ? 8 : 6;    // numbers that each of them is multiplied by

// Of sums of numbers times vectors, the numbers: that of row r and term t is data[t * apart + r].
struct Numbers {
  const float* data;
  int64_t apart;
};

// store(r, i, sum over terms of numbers(r, t) * vectors[t]) for kMany rows from `first` on and each of kVectors
// vectors.
template <int kMany, int kVectors, class Sum>
inline void SomeProducts(const Numbers& numbers, int64_t first, int64_t terms, const float* vectors, int64_t apart,
                         const Sum& store) {
  const float* number = numbers.data + first;
  V sums[kMany][kVectors];
  LIPFAST_UNROLL
  for (int r = 0; r < kMany; ++r) {
    LIPFAST_UNROLL
    for (int i = 0; i < kVectors; ++i) sums[r][i] = Zero();
  }
  for (int64_t t = 0; t < terms; ++t, number += numbers.apart, vectors += apart) {
    V v[kVectors];
    LIPFAST_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = Load(vectors + i * kLanes);
    LIPFAST_UNROLL
    for (int r = 0; r < kMany; ++r) {
      LIPFAST_UNROLL
      for (int i = 0; i < kVectors; ++i) sums[r][i] = Fma(Set(number[r]), v[i], sums[r][i]);
    }
  }
  LIPFAST_UNROLL
  for (int r = 0; r < kMany; ++r) {
    LIPFAST_UNROLL
    for (int i = 0; i < kVectors; ++i) store(first + r, i, sums[r][i]);
  }
}

// The same for all rows; where `again` allows it the last ones may be done twice.
template <int kVectors, class Sum>
inline void Products(const Numbers& numbers, int64_t rows, int64_t terms, const float* vectors, int64_t apart,
                     const Sum& store, bool again = true) {
  const int64_t together = again && rows > kRows ? rows : rows / kRows * kRows;
  for (int64_t r = 0; r < together; r += kRows) {
    SomeProducts<kRows, kVectors>(numbers, AtMost(r, rows - kRows), terms, vectors, apart, store);
  }
  for (int64_t r = together; r < rows; ++r) SomeProducts<1, kVectors>(numbers, r, terms, vectors, apart, store);
}

}  // namespace LIPFAST_NS
}  // namespace lipfast
