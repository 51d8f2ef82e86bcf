// The lane layout: SIMD lane l holds sub-image l.
//
// A picture plane is cut into a 4 x 4 grid of equal blocks; the 16 floats of one
// vector are the same pixel of the 16 blocks:
//
//      x ->   block_w
//    +------+------+------+------+       plane in memory, rows of vectors:
//  y | 0    | 1    | 2    | 3    |
//  | |  *   |  *   |  *   |  *   |         . . . . . . . .   <- halo row
//  v +------+------+------+------+         . v v v v v v .   v = 16 floats,
//    | 4    | 5    | 6    | 7    |         . v v * v v v .   one of each block
//    |  *   |  *   |  *   |  *   |         . v v v v v v .
//    +------+------+------+------+         . . . . . . . .   <- halo row
//    | 8    | 9    |10    |11    |         ^             ^
//    |  *   |  *   |  *   |  *   |         halo columns
//    +------+------+------+------+
//    |12    |13    |14    |15    |       all the * are one vector
//    |  *   |  *   |  *   |  *   |
//    +------+------+------+------+
//
// So a shift by a pixel is a shift by whole vectors: every load of every tap of
// a convolution is aligned, one weight is one broadcast, and nothing is gathered.
// The halo around each block holds copies of its neighbours' edge pixels, and at
// the picture's border what the padding says. FillHalo writes it, after which any
// kernel of size <= 2 * halo + 1 runs block by block as if there were no seams.
//
// When a side is not 4 * block, the last blocks hold dead pixels (y >= height or
// x >= width). Kernels may write anything finite there; FillHalo turns them into
// padding or zeros. Sums over pixels want them zero.
//
// Small pictures of a batch share the lanes: cut into 2 x 2 blocks, four of them lie in
// one vector, and uncut sixteen. What shares vectors is a sheet; kernels that know
// blocks and halos only run sheet by sheet, whatever it holds. The last sheet may lack
// pictures: for them black ones are computed, whose gradients are and stay zero. Only
// sums over a batch need to leave them out.
#pragma once

#include <cstdint>

namespace lipfast {

constexpr int kGrid = 4;  // blocks along each side of a picture that has all lanes; kGrid * kGrid lanes

// Pictures of a sheet.
constexpr int64_t SheetOn(int64_t grid) { return kGrid * kGrid / (grid * grid); }

// One axis of a map: how many blocks lie along it, their pixels, those of the picture.
struct Axis {
  int64_t grid, block, side;
};

// A map in the lane layout, or a range of its channels. Strides in floats.
struct LaneMap {
  float* data;                             // pixel (0, 0) of every block, sheet 0, channel 0; 64-byte aligned
  int64_t batch, channels, height, width;  // sheets, channels, pixels of a picture
  int64_t block_h, block_w;                // pixels of a block; grid * block >= side
  int64_t halo;                            // vectors around each block
  int64_t batch_stride, channel_stride, row_stride;
  int64_t grid = kGrid;  // blocks along each side of a picture: 1, 2 or 4
  int64_t missing = 0;   // pictures that the last sheet lacks

  float* At(int64_t n, int64_t c, int64_t row = 0, int64_t col = 0) const {
    return data + n * batch_stride + c * channel_stride + row * row_stride + col * kGrid * kGrid;
  }
  Axis rows() const { return {grid, block_h, height}; }
  Axis columns() const { return {grid, block_w, width}; }
  int64_t sheet() const { return SheetOn(grid); }
  int64_t pictures() const { return batch * sheet() - missing; }
  int64_t pixels() const { return pictures() * height * width; }                      // of a channel
  bool whole() const { return grid * block_h == height && grid * block_w == width; }  // no dead pixels
};

static inline int64_t AtMost(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a lane lies: in which picture of its sheet, and in which of its blocks.
struct LanePlace {
  int8_t picture, row, col;
};

struct LanePlaces {
  LanePlace at[kGrid * kGrid];
};

constexpr LanePlaces PlacesOnGrid(int grid) {
  LanePlaces places = {};
  for (int lane = 0; lane < kGrid * kGrid; ++lane) {
    const int block = lane % (grid * grid);
    places.at[lane] = {static_cast<int8_t>(lane / (grid * grid)), static_cast<int8_t>(block / grid),
                       static_cast<int8_t>(block % grid)};
  }
  return places;
}

constexpr LanePlaces kPlaces[] = {PlacesOnGrid(1), PlacesOnGrid(2), PlacesOnGrid(4)};

static inline const LanePlace& PlaceOf(int64_t lane, int64_t grid) { return kPlaces[grid >> 1].at[lane]; }

// The lane of block (row, col) of a picture.
static inline int64_t LaneAt(int64_t picture, int64_t row, int64_t col, int64_t grid) {
  return (picture * grid + row) * grid + col;
}

// Which lanes of a row and of a column of vectors are pixels of the picture: 1 or 0
// each. rows [block_h][16], columns [block_w][16]; both null where all are.
struct LivePixelMask {
  const float* rows;
  const float* columns;
};

// An ordinary tensor (n, c, y, x) with strides in floats: NCHW or channels_last.
struct PlainMap {
  float* data;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, col_stride;
  int64_t pixels = INT64_MAX;  // of a picture, row by row, that are there; the others count as dead
};

enum class Padding { kZero = 0, kReflect = 1, kReplicate = 2, kCircular = 3 };

// The pixel that padding copies to `at`, which lies outside [0, side); -1 is zero.
inline int64_t PaddingSource(int64_t at, int64_t side, Padding mode, int64_t pad) {
  if (mode == Padding::kZero || at < -pad || at >= side + pad) return -1;
  switch (mode) {
    case Padding::kReflect:
      return at < 0 ? -at : 2 * (side - 1) - at;
    case Padding::kReplicate:
      return at < 0 ? 0 : side - 1;
    default:
      return at < 0 ? at + side : at - side;
  }
}

struct LaneKernels {
  // Copies pixels in; those of missing pictures are zero. The halo of `to` is left as it is.
  void (*from_plain)(const PlainMap& from, const LaneMap& to, int threads);
  // Copies pixels out.
  void (*to_plain)(const LaneMap& from, const PlainMap& to, int threads);
  // Sets halo and dead pixels: what lies up to `pad` pixels outside the picture
  // gets the padding, everything farther out zero. pad <= halo; kReflect needs
  // pad < side, kCircular pad <= side.
  void (*fill_halo)(const LaneMap& map, Padding mode, int64_t pad, int threads);
  // Copies pixels between maps of equal size and grid, whose blocks and halos may differ.
  void (*reblock)(const LaneMap& from, const LaneMap& to, int threads);
};

}  // namespace lipfast
