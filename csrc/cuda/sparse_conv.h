// Weight-sparse 2-D convolution on an NVIDIA GPU: the C interface.
//
// Everything crosses as raw device pointers in a plain struct, so the library
// links neither torch nor Python and one build serves every torch version.
// lipfast/ops/_cuda_library.py builds the lists, checks shapes and owns all
// memory; this side trusts it. Maps are float32, contiguous, (batch, channels,
// rows, columns).
//
// One kernel serves forward and input gradient, every kernel size and stride,
// because the caller expresses each of them as a stride-1 problem on *virtual*
// channels. A strided convolution reads `phases` virtual channels per source
// channel, one for each parity of rows and columns; its input gradient writes
// `scale` virtual channels per output channel, likewise. Nothing depends on the
// order in which blocks run: equal inputs give equal bits.
#ifndef LIPFAST_CSRC_CUDA_SPARSE_CONV_H_
#define LIPFAST_CSRC_CUDA_SPARSE_CONV_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum LipfastPadding {
  kLipfastZeros = 0,
  kLipfastReflect = 1,
  kLipfastReplicate = 2,
  kLipfastCircular = 3,
};

enum LipfastKernel {
  kLipfastConvolution = 0,  // forward and input gradient
  kLipfastWeightGradient = 1,
};

// How a block cuts the work; see lipfast_tile_facts.
typedef struct LipfastTileFacts {
  int32_t warps;  // of a block; all share one tile of pixels
  int32_t lists;  // virtual output channels of a warp, one list each
  int32_t rows;   // of the tile, whose width is a warp's 32 lanes
  int32_t stage;  // virtual input channels staged together
  int32_t pitch;  // floats from one staged row to the next
} LipfastTileFacts;

// One launch. The kept weights of a (warp, stage, list) lie together, padded to
// an even number, ordered by warp, stage, list, virtual input channel and tap.
// An entry is (bytes from the first staged pixel of the tile to the one it reads,
// where in `values` or `gradient` the weight lives, -1 for padding). A warp reads
// its entries in order; 128 entries and one stage of counts more than there are
// may be read.
typedef struct LipfastSparseConv {
  const float* x;          // [batch, channels, rows, columns]
  const int32_t* entries;  // [listed + 128, 2]
  const int32_t* counts;   // [list_warps, stages, lists] entries without padding
  const int32_t* begins;   // [list_warps] first entry
  const int32_t* outputs;  // [list_warps, lists] virtual output channel, -1 for none
  const float* values;     // [kept]; convolution only
  const float* bias;       // [y channels] or null; convolution only
  float* y;                // convolution: written; weight gradient: dL/dy, read
  float* partial;          // [splits, listed] scratch; weight gradient only
  float* gradient;         // [kept]; weight gradient only
  int32_t listed;
  int32_t list_warps;  // a multiple of the tile's warps
  int32_t batch, channels, rows, columns;
  int32_t y_channels, y_rows, y_columns;
  int32_t stages;
  int32_t row_phases, column_phases;
  int32_t row_scale, column_scale;
  int32_t halo_rows;          // rows of taps - 1, of the stride-1 problem
  int32_t pad_top, pad_left;  // how far the window of output pixel 0 sticks out
  int32_t shift;              // columns before the first staged one that is used, so that
                              // columns of x on 16 bytes are staged on 16 bytes
  int32_t top_cut, left_cut;  // scaled outputs: rows and columns cut off at the start
  int32_t padding;            // LipfastPadding
  int32_t size;               // of the tile: 0 large, 1 medium, 2 small
  int32_t splits;             // weight gradient: blocks that share the pixels
} LipfastSparseConv;

// 1000 * version of the list format + size of LipfastSparseConv, so that a
// caller with another struct notices.
int lipfast_cuda_abi(void);

// Devices that this library can use; the return value is a cudaError_t.
int lipfast_cuda_devices(int32_t* count);
const char* lipfast_cuda_error(int code);

// 0, or cudaErrorInvalidValue for an unknown kernel or size.
int lipfast_tile_facts(int32_t kernel, int32_t size, LipfastTileFacts* facts);

// Shared memory of a block; 0 for an unknown kernel or size.
int lipfast_shared_bytes(int32_t kernel, int32_t size, int32_t halo_rows, int32_t phases);

// y = conv(x) + bias over the kept weights, on `device`, ordered by `stream`
// (a cudaStream_t). Returns the cudaError_t of the launches.
int lipfast_sparse_conv(const LipfastSparseConv* args, int32_t device, void* stream);

// gradient[slot] = sum over batch and pixels of dL/dy * x for every entry.
int lipfast_sparse_conv_weight_gradient(const LipfastSparseConv* args, int32_t device, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // LIPFAST_CSRC_CUDA_SPARSE_CONV_H_
