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
#pragma once

#include <cstdint>

namespace lipfast {

constexpr int kGrid = 4;  // blocks along each side; kGrid * kGrid lanes

// A map in the lane layout, or a range of its channels. Strides in floats.
struct LaneMap {
  float* data;                             // pixel (0, 0) of every block, image 0, channel 0; 64-byte aligned
  int64_t batch, channels, height, width;  // in pixels
  int64_t block_h, block_w;                // pixels of a block; 4 * block >= side
  int64_t halo;                            // vectors around each block
  int64_t batch_stride, channel_stride, row_stride;

  float* At(int64_t n, int64_t c, int64_t row = 0, int64_t col = 0) const {
    return data + n * batch_stride + c * channel_stride + row * row_stride + col * kGrid * kGrid;
  }
};

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
  // Copies pixels in. Halo and dead pixels of `to` are left as they are.
  void (*from_plain)(const PlainMap& from, const LaneMap& to, int threads);
  // Copies pixels out.
  void (*to_plain)(const LaneMap& from, const PlainMap& to, int threads);
  // Sets halo and dead pixels: what lies up to `pad` pixels outside the picture
  // gets the padding, everything farther out zero. pad <= halo; kReflect needs
  // pad < side, kCircular pad <= side.
  void (*fill_halo)(const LaneMap& map, Padding mode, int64_t pad, int threads);
  // Copies pixels between maps of equal size whose blocks differ.
  void (*reblock)(const LaneMap& from, const LaneMap& to, int threads);
};

}  // namespace lipfast
