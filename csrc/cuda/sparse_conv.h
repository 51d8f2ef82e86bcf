// Weight-sparse 2-D convolution on an NVIDIA GPU: the C interface.
//
// Everything crosses as raw device pointers in a plain struct, so the library
// links neither torch nor Python and one build serves every torch version.
// lipfast/ops/cuda.py builds the lists, checks shapes and owns all memory; this
// side trusts it. Maps are float32, contiguous, (batch, channels, rows,
// columns).
//
// One kernel serves forward and input gradient, at stride 1 and 2, because the
// caller expresses each of them as a stride-1 problem on *virtual* channels
// (LipfastShape below says how). Nothing depends on the order in which blocks
// run: equal inputs give equal bits.
#ifndef LIPFAST_CSRC_CUDA_SPARSE_CONV_H_
#define LIPFAST_CSRC_CUDA_SPARSE_CONV_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Which taps, strides and register tile a launch uses. The virtual channels:
//   kPoint      1x1 at stride 1: as they are.
//   kSame       3x3 at stride 1, forward; the input gradient is the same shape
//               with roles swapped and taps mirrored.
//   kHalf       3x3 at stride 2, forward. Source channel 2c+p holds the rows of
//               parity p of channel c, so vertically it is a stride-1 2-tap
//               conv.
//   kDouble     input gradient of a 3x3 at stride 2. Output channel 4c+2q+r
//               holds the pixels of row parity q and column parity r of channel
//               c; each parity class is a stride-1 conv with at most 2x2 taps.
enum LipfastGeometry {
  kLipfastPoint = 0,
  kLipfastSame = 1,
  kLipfastHalf = 2,
  kLipfastDouble = 3,
};

enum LipfastPadding {
  kLipfastZeros = 0,
  kLipfastReflect = 1,
  kLipfastReplicate = 2,
  kLipfastCircular = 3,
};

// What the kernels must know about one geometry; see lipfast_geometry_facts.
typedef struct LipfastGeometryFacts {
  int32_t group;  // virtual output channels in a list
  int32_t taps;
  int32_t tap_columns;   // tap = row * tap_columns + column
  int32_t stage;         // virtual input channels staged together
  int32_t tile_rows[2];  // output pixels of a block: large tile, small tile
  int32_t tile_columns[2];
} LipfastGeometryFacts;

// One launch. The lists order the kept weights by (group of virtual output
// channels, virtual input channel, output channel in the group, tap). An
// entry's code is ((input channel % stage) * group + channel in group) * taps +
// tap, its slot says where in `values` (or `gradient`) the weight lives;
// starts[g * input_channels + c] is where group g, channel c begins, and one
// more number ends the last list.
typedef struct LipfastSparseConv {
  const float* x;         // [batch, input_channels / row_phases, rows, columns]
  const int32_t* codes;   // [kept]
  const int32_t* slots;   // [kept] permutation of 0..kept-1
  const int32_t* starts;  // [groups * input_channels + 1]
  const float* values;    // [kept]; forward only
  const float* bias;      // [output_channels / output_scale^2] or null; forward
  void* packed;           // [kept] 8-byte scratch; forward only
  float* y;               // forward: output; weight gradient: dL/dy (read)
  float* partial;         // [splits, kept] scratch; weight gradient only
  float* gradient;        // [kept]; weight gradient only
  int32_t kept;
  int32_t batch;
  int32_t input_channels;   // virtual
  int32_t output_channels;  // virtual
  int32_t rows, columns;    // of x
  int32_t y_rows, y_columns;
  int32_t pad_top, pad_left;  // how far the window of output pixel 0 sticks out
  int32_t output_offset;      // kDouble: rows and columns cut off at the start
  int32_t padding;            // LipfastPadding
  int32_t geometry;           // LipfastGeometry
  int32_t small_tile;         // 1 picks the small register tile
  int32_t splits;             // weight gradient: blocks that share the pixels
} LipfastSparseConv;

// 1000 * version of the list format + size of LipfastSparseConv, so that a
// caller with another struct notices.
int lipfast_cuda_abi(void);

// Devices that this library can use; the return value is a cudaError_t.
int lipfast_cuda_devices(int32_t* count);
const char* lipfast_cuda_error(int code);

// 0, or cudaErrorInvalidValue for an unknown geometry.
int lipfast_geometry_facts(int32_t geometry, LipfastGeometryFacts* facts);

// y = conv(x) + bias over the kept weights, on `device`, ordered by `stream`
// (a cudaStream_t). Returns the cudaError_t of the launches.
int lipfast_sparse_conv(const LipfastSparseConv* args, int32_t device, void* stream);

// gradient[slots[e]] = sum over batch and pixels of dL/dy * x for every entry.
int lipfast_sparse_conv_weight_gradient(const LipfastSparseConv* args, int32_t device, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // LIPFAST_CSRC_CUDA_SPARSE_CONV_H_
