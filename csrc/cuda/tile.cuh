// How the sparse convolution kernels cut their work: register tiles, the
// shared-memory stage, and the dispatch from a list entry to straight code.
#ifndef LIPFAST_CSRC_CUDA_TILE_CUH_
#define LIPFAST_CSRC_CUDA_TILE_CUH_

#include "launch.cuh"
#include "sparse_conv.h"

namespace lipfast {

constexpr int kWarp = 32;
constexpr int kWarps = 4;                 // each has its own group of output channels and
constexpr int kThreads = kWarp * kWarps;  // all share one tile of pixels
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kLanesAcross = 8;  // a warp is 8 x 4 register tiles
constexpr int kLanesDown = kWarp / kLanesAcross;
constexpr int kOutside = -1;   // a pixel that reads as zero
constexpr int kEnd = 1 << 30;  // a code that closes a list

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// A register tile of ROWS x COLUMNS output pixels for GROUP output channels.
//
// A thread keeps one input channel's window in registers and uses it for every
// kept weight of GROUP channels, so one load feeds several multiply-adds: a
// kernel that loads an operand for each of them cannot pass a quarter of the
// peak (32 loaded words against 128 multiply-adds a clock and SM).
template <int TAP_ROWS, int TAP_COLUMNS, int COLUMN_STRIDE, int ROW_PHASES, int OUTPUT_SCALE, int GROUP, int ROWS,
          int COLUMNS, int STAGE>
struct Tile {
  static constexpr int kTapRows = TAP_ROWS;
  static constexpr int kTapColumns = TAP_COLUMNS;
  static constexpr int kTaps = TAP_ROWS * TAP_COLUMNS;
  static constexpr int kGroup = GROUP;
  static constexpr int kCodes = GROUP * kTaps;
  static constexpr int kColumnStride = COLUMN_STRIDE;
  static constexpr int kRowPhases = ROW_PHASES;
  static constexpr int kOutputScale = OUTPUT_SCALE;
  static constexpr int kRows = ROWS;
  static constexpr int kColumns = COLUMNS;
  static constexpr int kPixels = ROWS * COLUMNS;

  static constexpr int kWindowRows = ROWS - 1 + TAP_ROWS;
  static constexpr int kWindowColumns = (COLUMNS - 1) * COLUMN_STRIDE + TAP_COLUMNS;
  static constexpr int kWindow = kWindowRows * kWindowColumns;

  static constexpr int kTileRows = kLanesDown * ROWS;  // output pixels
  static constexpr int kTileColumns = kLanesAcross * COLUMNS;

  // One channel of the tile's input in shared memory. Rows start on 16 bytes,
  // so a window row is read with 128-bit loads.
  static constexpr int kStageRows = kTileRows - 1 + TAP_ROWS;
  static constexpr int kStageColumns = (kTileColumns - 1) * COLUMN_STRIDE + TAP_COLUMNS;
  static constexpr int kPitch = (kStageColumns + 3) / 4 * 4;
  static constexpr int kPlane = kStageRows * kPitch;
  static constexpr int kCopies = (kPlane + kThreads - 1) / kThreads;
  static constexpr int kStage = STAGE;                      // channels a stage
  static constexpr int kListCapacity = STAGE * kCodes + 1;  // + 1: read ahead

  static constexpr size_t kStageBytes = sizeof(float) * ((STAGE * kPlane + 3) / 4 * 4);
  static constexpr size_t kListBytes = (sizeof(int2) * kWarps * kListCapacity + 15) / 16 * 16;
  static constexpr size_t kSharedBytes = 2 * (kStageBytes + kListBytes);

  // Where in the window the pixel (row, column) of a tap lies.
  static constexpr __device__ int WindowIndex(int tap, int row, int column) {
    return (row + tap / TAP_COLUMNS) * kWindowColumns + column * COLUMN_STRIDE + tap % TAP_COLUMNS;
  }
};

// Position of a padded coordinate in [0, size), or kOutside.
__device__ inline int SourceIndex(int i, int size, int padding) {
  if (i >= 0 && i < size) return i;
  if (padding == kLipfastReplicate) return i < 0 ? 0 : size - 1;
  if (padding == kLipfastReflect) i = i < 0 ? -i : 2 * size - 2 - i;
  if (padding == kLipfastCircular) i = i < 0 ? i + size : i - size;
  return i >= 0 && i < size ? i : kOutside;  // the tile may overhang the map
}

// Which pixels of x this thread copies for every channel: found once, so the
// channel loop neither divides nor looks at borders.
template <class T>
struct Source {
  int offset[T::kRowPhases][T::kCopies];

  __device__ Source(const LipfastSparseConv& a, int tile_row, int tile_column) {
#pragma unroll
    for (int k = 0; k < T::kCopies; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kThreads;
      const int row = i / T::kPitch, column = i % T::kPitch;
      const bool inside = row < T::kStageRows && column < T::kStageColumns;
      const int source_column = SourceIndex(tile_column * T::kColumnStride + column - a.pad_left, a.columns, a.padding);
#pragma unroll
      for (int phase = 0; phase < T::kRowPhases; ++phase) {
        const int source_row = SourceIndex((tile_row + row) * T::kRowPhases + phase - a.pad_top, a.rows, a.padding);
        offset[phase][k] = inside && source_row != kOutside && source_column != kOutside
                               ? source_row * a.columns + source_column
                               : kOutside;
      }
    }
  }
};

// The two halves of shared memory that copying and computing take turns on.
template <class T>
struct Stage {
  float* planes;  // [kStage][kStageRows][kPitch]
  int2* lists;    // [kWarps][kListCapacity] of (code, weight or position)

  __device__ Stage(float4* shared, int half) {
    char* base = reinterpret_cast<char*>(shared) + half * (T::kStageBytes + T::kListBytes);
    planes = reinterpret_cast<float*>(base);
    lists = reinterpret_cast<int2*>(base + T::kStageBytes);
  }
};

// Writes the zeros that surround the map into both halves. A pixel outside is
// outside for every channel, so copies never touch these places again.
template <class T>
__device__ inline void ZeroOutside(const Source<T>& source, float4* shared) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* planes = Stage<T>(shared, half).planes;
    for (int c = 0; c < T::kStage; ++c) {
#pragma unroll
      for (int k = 0; k < T::kCopies; ++k) {
        const int i = static_cast<int>(threadIdx.x) + k * kThreads;
        // The phase of a place in the stage is that of every channel put there.
        const int offset = source.offset[T::kRowPhases == 1 ? 0 : c % T::kRowPhases][k];
        if (i < T::kPlane && offset == kOutside) planes[c * T::kPlane + i] = 0.0f;
      }
    }
  }
}

// Starts copying channels [first, first + kStage) of item `n` into `stage`.
// Behind the last channel it copies that one again: nobody reads it, and
// straight code is shorter than a test.
template <class T>
__device__ inline void CopyPlanes(const LipfastSparseConv& a, const Source<T>& source, int n, int first,
                                  const Stage<T>& stage) {
  const int plane = a.rows * a.columns;
  const float* item = a.x + static_cast<size_t>(n) * (a.input_channels / T::kRowPhases) * plane;
#pragma unroll
  for (int c = 0; c < T::kStage; ++c) {
    const int channel = min(first + c, a.input_channels - T::kRowPhases + c % T::kRowPhases);
    const float* from = item + static_cast<size_t>(channel / T::kRowPhases) * plane;
#pragma unroll
    for (int k = 0; k < T::kCopies; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kThreads;
      const int offset = source.offset[c % T::kRowPhases][k];
      if (offset != kOutside) __pipeline_memcpy_async(stage.planes + c * T::kPlane + i, from + offset, sizeof(float));
    }
  }
}

// Reads this thread's window of one staged channel.
template <class T>
__device__ inline void ReadWindow(const float* plane, float (&window)[T::kWindow]) {
  const int lane = threadIdx.x % kWarp;
  const float* from =
      plane + lane / kLanesAcross * T::kRows * T::kPitch + lane % kLanesAcross * T::kColumns * T::kColumnStride;
  constexpr int kVectors = T::kWindowColumns / 4;
  constexpr bool kAligned = T::kColumns * T::kColumnStride % 4 == 0;
#pragma unroll
  for (int row = 0; row < T::kWindowRows; ++row) {
    float* to = window + row * T::kWindowColumns;
    int column = 0;
    if constexpr (kAligned) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4 four = *reinterpret_cast<const float4*>(from + row * T::kPitch + 4 * v);
        to[4 * v] = four.x;
        to[4 * v + 1] = four.y;
        to[4 * v + 2] = four.z;
        to[4 * v + 3] = four.w;
      }
      column = 4 * kVectors;
    }
#pragma unroll
    for (; column + 1 < T::kWindowColumns; column += 2) {
      const float2 two = *reinterpret_cast<const float2*>(from + row * T::kPitch + column);
      to[column] = two.x;
      to[column + 1] = two.y;
    }
    if (column < T::kWindowColumns) {
      to[column] = from[row * T::kPitch + column];
    }
  }
}

// Calls `run` with the constant `code` (an integral_constant): a real branch to
// code whose registers are all known. A test of each tap's mask bit would be
// predicated by nvcc, and a predicated multiply-add costs as much as a real
// one.
template <int CODES, class Run>
__device__ __forceinline__ void Dispatch(int code, Run run) {
#define LIPFAST_CASE(n)                                 \
  case n:                                               \
    if constexpr (n < CODES) return run(Constant<n>()); \
    break;
#define LIPFAST_CASES(n) \
  LIPFAST_CASE(n)        \
  LIPFAST_CASE(n + 1)    \
  LIPFAST_CASE(n + 2)    \
  LIPFAST_CASE(n + 3)    \
  LIPFAST_CASE(n + 4)    \
  LIPFAST_CASE(n + 5)    \
  LIPFAST_CASE(n + 6)    \
  LIPFAST_CASE(n + 7)
  static_assert(CODES <= 72, "add cases");
  switch (code) {
    LIPFAST_CASES(0)
    LIPFAST_CASES(8)
    LIPFAST_CASES(16)
    LIPFAST_CASES(24)
    LIPFAST_CASES(32)
    LIPFAST_CASES(40)
    LIPFAST_CASES(48)
    LIPFAST_CASES(56)
    LIPFAST_CASES(64)
  }
  __builtin_unreachable();  // the lists are checked when they are built
#undef LIPFAST_CASES
#undef LIPFAST_CASE
}

}  // namespace lipfast

#endif  // LIPFAST_CSRC_CUDA_TILE_CUH_
