// How a block stages its part of a map in shared memory.
#ifndef LIPFAST_CSRC_CUDA_TILE_CUH_
#define LIPFAST_CSRC_CUDA_TILE_CUH_

#include "launch.cuh"
#include "sparse_conv.h"

namespace lipfast {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kPitch = 40;    // floats of a staged row: 32 lanes and up to 8 columns of halo
constexpr int kBuffers = 3;   // stages in flight or in use
constexpr int kOutside = -1;  // a pixel that reads as zero
constexpr int kVector = 4;    // floats of the widest copy

// A block of WARPS warps computes ROWS x 32 pixels; a lane owns a column, a warp
// LISTS output channels. STAGE virtual input channels are staged together.
//
// A multiply-add reads its pixel from shared memory, 32 words a clock and
// multiprocessor, so these kernels cannot pass a quarter of an H100's FP32 peak.
// Keeping windows in registers can, on paper; reaching a register by a weight's
// position takes a branch for each weight, and runs 2 to 4 times slower.
template <int WARPS, int LISTS, int ROWS, int STAGE>
struct Tile {
  static constexpr int kWarps = WARPS;
  static constexpr int kThreads = WARPS * kWarp;
  static constexpr int kLists = LISTS;
  static constexpr int kRows = ROWS;
  static constexpr int kStage = STAGE;

  // Floats of one staged virtual channel.
  static constexpr __host__ __device__ int Plane(int halo_rows) { return (ROWS + halo_rows) * kPitch; }
  static constexpr int SharedBytes(int halo_rows, int phases) {
    return static_cast<int>(sizeof(float)) * Plane(halo_rows) * (phases + kBuffers * STAGE) +
           static_cast<int>(sizeof(int4)) * WARPS * kWarp;
  }
};

// What a block of tile T keeps in shared memory.
template <class T>
struct Shared {
  int plane;      // floats of a staged channel
  int* source;    // [phases][plane] offset of each staged pixel in its channel, or kOutside
  float* planes;  // [kBuffers][kStage][plane]
  int4* pairs;    // [kWarps][kWarp] pairs of entries
  float* rest;

  __device__ Shared(const LipfastSparseConv& a, float4* memory) : plane(T::Plane(a.halo_rows)) {
    source = reinterpret_cast<int*>(memory);
    planes = reinterpret_cast<float*>(source + a.row_phases * a.column_phases * plane);
    pairs = reinterpret_cast<int4*>(planes + kBuffers * T::kStage * plane);
    rest = reinterpret_cast<float*>(pairs + T::kThreads);
  }

  __device__ float* Stage(int buffer) const { return planes + buffer * T::kStage * plane; }
};

// Position of a padded coordinate in [0, size), or kOutside.
__device__ inline int SourceIndex(int i, int size, int padding) {
  if (i >= 0 && i < size) return i;
  if (padding == kLipfastReplicate) return i < 0 ? 0 : size - 1;
  if (padding == kLipfastReflect) i = i < 0 ? -i : 2 * size - 2 - i;
  if (padding == kLipfastCircular) i = i < 0 ? i + size : i - size;
  return i >= 0 && i < size ? i : kOutside;  // the tile may overhang the map
}

// Works out, once for a tile, where every staged pixel comes from, and writes the
// zeros around the map: a pixel outside is outside for every channel.
template <class T>
__device__ inline void PrepareStages(const LipfastSparseConv& a, const Shared<T>& shared, int tile_row,
                                     int tile_column) {
  const int phases = a.row_phases * a.column_phases;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < phases * shared.plane; i += T::kThreads) {
    const int phase = i / shared.plane, pixel = i % shared.plane;
    const int row = (tile_row + pixel / kPitch) * a.row_phases + phase / a.column_phases - a.pad_top;
    const int column =
        (tile_column + pixel % kPitch - a.shift) * a.column_phases + phase % a.column_phases - a.pad_left;
    const int source_row = SourceIndex(row, a.rows, a.padding);
    const int source_column = SourceIndex(column, a.columns, a.padding);
    const bool inside = source_row != kOutside && source_column != kOutside;
    shared.source[i] = inside ? source_row * a.columns + source_column : kOutside;
    if (inside) continue;
#pragma unroll 1
    for (int c = phase; c < kBuffers * T::kStage; c += phases) shared.planes[c * shared.plane + pixel] = 0.0f;
  }
}

// A thread's part in copying stages: four neighbouring pixels of every step-th
// channel, worked out once, so that the loop over channels does not divide.
template <class T>
struct Copier {
  const float* item;
  int pixel, channel, step;

  __device__ Copier(const LipfastSparseConv& a, const Shared<T>& shared, int n)
      : item(a.x + static_cast<size_t>(n) * a.channels * a.rows * a.columns) {
    const int groups = shared.plane / kVector;  // at most kThreads, as the caller makes sure
    pixel = threadIdx.x % groups * kVector;
    step = T::kThreads / groups;
    channel = threadIdx.x / groups < step ? threadIdx.x / groups : T::kStage;
  }

  // Starts copying virtual channels [first, first + kStage) into a stage. Behind
  // the last channel it copies that one again: nobody reads it, and straight code
  // is shorter than a test.
  __device__ __forceinline__ void Copy(const LipfastSparseConv& a, const Shared<T>& shared, int first,
                                       float* stage) const {
    const int phase_bits = a.row_phases + a.column_phases - 2;  // phases are 1 or 2
    const int phase_mask = (1 << phase_bits) - 1;
    const bool aligned = a.columns % kVector == 0;
#pragma unroll 1
    for (int c = channel; c < T::kStage; c += step) {
      const float* from =
          item + static_cast<size_t>(min((first + c) >> phase_bits, a.channels - 1)) * a.rows * a.columns;
      float* to = stage + c * shared.plane + pixel;
      const int4 at = *reinterpret_cast<const int4*>(shared.source + (c & phase_mask) * shared.plane + pixel);
      if (aligned && at.x >= 0 && at.x % kVector == 0 && at.y == at.x + 1 && at.z == at.x + 2 && at.w == at.x + 3) {
        __pipeline_memcpy_async(to, from + at.x, sizeof(float4));
        continue;
      }
      if (at.x != kOutside) __pipeline_memcpy_async(to, from + at.x, sizeof(float));
      if (at.y != kOutside) __pipeline_memcpy_async(to + 1, from + at.y, sizeof(float));
      if (at.z != kOutside) __pipeline_memcpy_async(to + 2, from + at.z, sizeof(float));
      if (at.w != kOutside) __pipeline_memcpy_async(to + 3, from + at.w, sizeof(float));
    }
  }
};

// Calls run(staged planes) for all stages of one item in order,
// with the next ones always in flight.
template <class T, class Run>
__device__ __forceinline__ void ForEachStage(const LipfastSparseConv& a, const Shared<T>& shared, int n, Run run) {
  const Copier<T> copier(a, shared, n);
#pragma unroll 1
  for (int s = 0; s < kBuffers - 1; ++s) {
    if (s < a.stages) copier.Copy(a, shared, s * T::kStage, shared.Stage(s));
    __pipeline_commit();
  }
#pragma unroll 1
  for (int s = 0, buffer = 0; s < a.stages; ++s) {
    __pipeline_wait_prior(kBuffers - 2);  // the stage we are about to read has arrived
    __syncthreads();                      // for every thread, and all are done with the one before
    const int ahead = s + kBuffers - 1;
    const int refilled = buffer == 0 ? kBuffers - 1 : buffer - 1;
    if (ahead < a.stages) copier.Copy(a, shared, ahead * T::kStage, shared.Stage(refilled));
    __pipeline_commit();
    run(shared.Stage(buffer));
    buffer = buffer + 1 == kBuffers ? 0 : buffer + 1;
  }
}

// Where a block's tile of (virtual) output pixels begins.
template <class T>
struct Corner {
  int row, column;

  __device__ Corner(int tile, int columns) {
    const int across = (columns + kWarp - 1) / kWarp;
    row = tile / across * T::kRows;
    column = tile % across * kWarp;
  }
};

}  // namespace lipfast

#endif  // LIPFAST_CSRC_CUDA_TILE_CUH_
