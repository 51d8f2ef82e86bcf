// Where single pixels of a lane map lie, for what cannot go vector by vector; for kernel sources only.
#pragma once

#include <vector>

#include "cpu/lanes.h"
#include "cpu/pool.h"
#include "cpu/vec.h"

namespace lipfast {
namespace LIPFAST_NS {

// Pixel (y, x) of a picture lies picture(i) + row(y) + col(x) floats from pixel (0, 0) of the plane: two divisions
// each, made once.
class PixelOffsets {
 public:
  explicit PixelOffsets(const LaneMap& m) : blocks_(m.grid * m.grid), rows_(m.height), cols_(m.width) {
    for (int64_t y = 0; y < m.height; ++y) rows_[y].floats = y % m.block_h * m.row_stride + y / m.block_h * m.grid;
    for (int64_t x = 0; x < m.width; ++x) cols_[x].floats = x % m.block_w * kLanes + x / m.block_w;
  }
  int64_t picture(int64_t i) const { return i * blocks_; }
  int64_t row(int64_t y) const { return rows_[y].floats; }
  int64_t col(int64_t x) const { return cols_[x].floats; }

 private:
  struct Offset {  // a type of our own: see vec.h on templates
    int64_t floats;
  };
  int64_t blocks_;
  std::vector<Offset> rows_, cols_;
};

// body(n, c, i) for picture i of sheet n, missing ones included, in each channel.
template <class Body>
void ForEachPicture(const LaneMap& m, int threads, const Body& body) {
  ParallelFor(threads, m.batch * m.channels * m.sheet(), [&](int64_t at) {
    const int64_t plane = at / m.sheet();
    body(plane / m.channels, plane % m.channels, at % m.sheet());
  });
}

}  // namespace LIPFAST_NS
}  // namespace lipfast
