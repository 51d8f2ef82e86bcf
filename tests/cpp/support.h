// What the C++ kernel tests share: maps in memory of exactly their size, and counted expectations.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cpu/lanes.h"

namespace lipfast {

inline int passed = 0, failed = 0;

inline void Expect(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

// 64-byte aligned floats; a sanitizer sees the first one past the end.
struct Floats {
  explicit Floats(int64_t n) : size(n), data(static_cast<float*>(std::aligned_alloc(64, (n * 4 + 63) / 64 * 64))) {
    for (int64_t i = 0; i < n; ++i) data[i] = 0.0f;
  }
  ~Floats() { std::free(data); }
  Floats(const Floats&) = delete;
  int64_t size;
  float* data;
};

inline int64_t Sheets(int64_t pictures, int64_t grid) { return (pictures + SheetOn(grid) - 1) / SheetOn(grid); }

struct Map {
  Map(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t block_h, int64_t block_w, int64_t halo,
      int64_t grid = kGrid)
      : floats(Sheets(batch, grid) * 16 * channels * (block_h + 2 * halo) * (block_w + 2 * halo)) {
    const int64_t row = (block_w + 2 * halo) * 16, plane = (block_h + 2 * halo) * row, sheets = Sheets(batch, grid);
    lanes = {floats.data,
             sheets,
             channels,
             height,
             width,
             block_h,
             block_w,
             halo,
             channels * plane,
             plane,
             row,
             grid,
             sheets * SheetOn(grid) - batch};
    lanes.data = lanes.At(0, 0, halo, halo);
  }
  Floats floats;
  LaneMap lanes;
};

using Tensor = std::vector<float>;  // NCHW

inline PlainMap Plain(Tensor& t, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return {t.data(), batch, channels, height, width, channels * height * width, height * width, width, 1};
}

inline Tensor Draw(int64_t n, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Tensor t(n);
  for (float& x : t) x = normal(random);
  return t;
}

// Distance in norm, relative to the larger of the norm and what inputs of size 1 make likely.
inline double Error(const Tensor& got, const std::vector<double>& want) {
  double difference = 0, norm = 1.0 + static_cast<double>(want.size());  // inputs are of size 1
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

// The passes between convolutions, pruning and the optimiser, on the active instruction set; test_passes.cc.
void RunPasses(int threads, const std::string& name);

// Which steps of a program run on one thread; test_pace.cc.
void RunPace();

// What becomes of a chunk that fails; test_pool.cc.
void RunPool();
void RunArenas();

}  // namespace lipfast
