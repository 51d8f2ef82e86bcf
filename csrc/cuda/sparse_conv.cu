// See sparse_conv.h for the interface and tile.cuh for how work is cut.
#include "tile.cuh"

namespace lipfast {

//                   taps   stride phases scale group rows columns stage
using PointLarge = Tile<1, 1, 1, 1, 1, 12, 4, 4, 12>;
using PointSmall = Tile<1, 1, 1, 1, 1, 12, 2, 2, 12>;
using SameLarge = Tile<3, 3, 1, 1, 1, 8, 4, 4, 4>;
using SameSmall = Tile<3, 3, 1, 1, 1, 8, 2, 2, 4>;
using HalfLarge = Tile<2, 3, 2, 2, 1, 8, 4, 4, 2>;
using HalfSmall = Tile<2, 3, 2, 2, 1, 8, 2, 2, 2>;
using DoubleLarge = Tile<2, 2, 1, 1, 2, 12, 4, 4, 4>;
using DoubleSmall = Tile<2, 2, 1, 1, 2, 12, 2, 2, 4>;

// Where the block's tile of output pixels begins.
template <class T>
struct Corner {
  int row, column;

  __device__ Corner(int tile, int columns) {
    const int across = (columns + T::kTileColumns - 1) / T::kTileColumns;
    row = tile / across * T::kTileRows;
    column = tile % across * T::kTileColumns;
  }
};

// Virtual output size: the pixels of one parity class where parities exist.
template <class T>
__host__ __device__ inline int VirtualSize(int size, int offset) {
  return (size + offset + T::kOutputScale - 1) / T::kOutputScale;
}

// Starts copying into `stage` this warp's list of channels [first, first +
// kStage) and closes it with kEnd.
template <class T>
__device__ inline void CopyList(const LipfastSparseConv& a, int group, int first, const Stage<T>& stage) {
  int2* to = stage.lists + threadIdx.x / kWarp * T::kListCapacity;
  const int lane = threadIdx.x % kWarp;
  int begin = 0, end = 0;
  if (group * T::kGroup < a.output_channels) {
    const int32_t* starts = a.starts + group * a.input_channels;
    begin = starts[first];
    end = starts[min(first + T::kStage, a.input_channels)];
  }
  const int2* entries = static_cast<const int2*>(a.packed);
#pragma unroll 1  // a list rarely has more entries than a warp has lanes
  for (int e = begin + lane; e < end; e += kWarp) {
    __pipeline_memcpy_async(to + (e - begin), entries + e, sizeof(int2));
  }
  if (lane == 0) to[end - begin] = make_int2(kEnd, 0);
}

// A warp's place in its list. `code` is relative to the channel being worked
// on, so it reaches kCodes where that channel's entries end.
struct Cursor {
  const int2* entry;
  int2 ahead;  // loaded one step early, in flight while a weight is used
  int code;

  __device__ explicit Cursor(const int2* list) : entry(list), ahead(*list) { Advance(0); }

  // All lanes hold the same code. The shuffle tells the compiler so: without it
  // each branch below is fenced against a diverged warp, twelve instructions
  // for each kept weight.
  __device__ void Advance(int base) { code = __shfl_sync(kFullWarp, ahead.x, 0) - base; }

  __device__ float TakeWeight() {
    const float weight = __int_as_float(ahead.y);
    ahead = *++entry;  // the list ends in kEnd, so this stays inside
    return weight;
  }
};

// Calls run(Constant<code>(), weight) for the entries of one input channel.
//
// With many codes a two-step choice (output channel by straight-line loops,
// then tap) needs fewer instructions than one wide one.
template <class T, int CHANNEL = 0, class Run>
__device__ __forceinline__ void ForEachWeight(Cursor& cursor, int base, Run run) {
  if constexpr (T::kTaps < 6) {
    while (cursor.code < T::kCodes) {
      const int code = cursor.code;
      const float weight = cursor.TakeWeight();
      Dispatch<T::kCodes>(code, [&](auto chosen) LIPFAST_INLINE { run(chosen, weight); });
      cursor.Advance(base);
    }
  } else if constexpr (CHANNEL < T::kGroup) {
    while (cursor.code < (CHANNEL + 1) * T::kTaps) {
      const int tap = cursor.code - CHANNEL * T::kTaps;
      const float weight = cursor.TakeWeight();
      Dispatch<T::kTaps>(tap, [&](auto chosen) LIPFAST_INLINE {
        run(Constant<CHANNEL * T::kTaps + decltype(chosen)::value>(), weight);
      });
      cursor.Advance(base);
    }
    ForEachWeight<T, CHANNEL + 1>(cursor, base, run);
  }
}

// Walks over all input channels of item `n` with the next stage always in
// flight. For each channel in which this warp's group has kept weights, calls
// run(code, weight, window) for each of them in list order.
template <class T, class Run>
__device__ __forceinline__ void ForEachKeptWeight(const LipfastSparseConv& a, const Source<T>& source, int n, int group,
                                                  float4* shared, Run run) {
  ZeroOutside<T>(source, shared);
  CopyPlanes<T>(a, source, n, 0, Stage<T>(shared, 0));
  CopyList<T>(a, group, 0, Stage<T>(shared, 0));
  __pipeline_commit();
  for (int first = 0, half = 0; first < a.input_channels; first += T::kStage, half ^= 1) {
    if (first + T::kStage < a.input_channels) {
      CopyPlanes<T>(a, source, n, first + T::kStage, Stage<T>(shared, half ^ 1));
      CopyList<T>(a, group, first + T::kStage, Stage<T>(shared, half ^ 1));
    }
    __pipeline_commit();
    __pipeline_wait_prior(1);  // the half we are about to read has arrived
    __syncthreads();           // for every thread of the block

    const Stage<T> stage(shared, half);
    Cursor cursor(stage.lists + threadIdx.x / kWarp * T::kListCapacity);
    for (int c = 0; c < T::kStage; ++c) {
      if (cursor.code < T::kCodes) {
        float window[T::kWindow];
        ReadWindow<T>(stage.planes + c * T::kPlane, window);
        ForEachWeight<T>(cursor, c * T::kCodes,
                         [&](auto code, float weight) LIPFAST_INLINE { run(code, weight, window); });
      }
      cursor.code -= T::kCodes;
    }
    __syncthreads();  // nobody reads this half any more: it may be refilled
  }
}

// entries[e] = (code, weight): one 8-byte load per kept weight later on. The
// weight gradient needs none and gets zeros.
__global__ void __launch_bounds__(kThreads)
    PackKernel(const int32_t* __restrict__ codes, const int32_t* __restrict__ slots, const float* __restrict__ values,
               int kept, int2* __restrict__ entries) {
  const int e = blockIdx.x * kThreads + threadIdx.x;
  if (e >= kept) return;
  const float value = values == nullptr ? 0.0f : values[slots[e]];
  entries[e] = make_int2(codes[e], __float_as_int(value));
}

// One kept weight: kPixels multiply-adds on registers.
template <class T, int CODE>
__device__ __forceinline__ void Accumulate(float weight, const float (&window)[T::kWindow],
                                           float (&sum)[T::kGroup][T::kPixels]) {
  constexpr int kChannel = CODE / T::kTaps, kTap = CODE % T::kTaps;
#pragma unroll
  for (int row = 0; row < T::kRows; ++row) {
#pragma unroll
    for (int column = 0; column < T::kColumns; ++column) {
      float& s = sum[kChannel][row * T::kColumns + column];
      s = fmaf(weight, window[T::WindowIndex(kTap, row, column)], s);
    }
  }
}

template <class T>
__device__ inline void StoreTile(const LipfastSparseConv& a, int n, int group, const Corner<T>& corner,
                                 const float (&sum)[T::kGroup][T::kPixels]) {
  constexpr int kClasses = T::kOutputScale * T::kOutputScale;
  const int lane = threadIdx.x % kWarp;
  const int row0 = corner.row + lane / kLanesAcross * T::kRows;
  const int column0 = corner.column + lane % kLanesAcross * T::kColumns;
  const int channels = a.output_channels / kClasses;
  const bool vector = T::kOutputScale == 1 && T::kColumns == 4 && a.y_columns % 4 == 0 && column0 + 4 <= a.y_columns;
#pragma unroll
  for (int g = 0; g < T::kGroup; ++g) {
    const int channel = (group * T::kGroup + g) / kClasses;
    const int parity_row = g % kClasses / T::kOutputScale;
    const int parity_column = g % T::kOutputScale;
    if (channel >= channels) continue;
    float* plane = a.y + (static_cast<size_t>(n) * channels + channel) * a.y_rows * a.y_columns;
#pragma unroll
    for (int r = 0; r < T::kRows; ++r) {
      const int row = (row0 + r) * T::kOutputScale + parity_row - a.output_offset;
      if (row < 0 || row >= a.y_rows) continue;
      float* to = plane + static_cast<size_t>(row) * a.y_columns;
      const float* from = sum[g] + r * T::kColumns;
      if (vector) {
        *reinterpret_cast<float4*>(to + column0) =
            make_float4(from[0], from[1], from[2 % T::kColumns], from[T::kColumns - 1]);
        continue;
      }
#pragma unroll
      for (int c = 0; c < T::kColumns; ++c) {
        const int column = (column0 + c) * T::kOutputScale + parity_column - a.output_offset;
        if (column >= 0 && column < a.y_columns) to[column] = from[c];
      }
    }
  }
}

// Grid: (tiles, groups / kWarps, batch).
template <class T>
__global__ void __launch_bounds__(kThreads, 2) SparseConvKernel(const LipfastSparseConv a) {
  LIPFAST_DYNAMIC_SHARED(shared);
  const int group = blockIdx.y * kWarps + threadIdx.x / kWarp;
  const int n = blockIdx.z;
  const Corner<T> corner(blockIdx.x, VirtualSize<T>(a.y_columns, a.output_offset));
  const Source<T> source(a, corner.row, corner.column);

  float sum[T::kGroup][T::kPixels];
#pragma unroll
  for (int g = 0; g < T::kGroup; ++g) {
    const int channel = group * T::kGroup + g;
    const float start = a.bias != nullptr && channel < a.output_channels ? a.bias[channel] : 0.0f;
#pragma unroll
    for (int p = 0; p < T::kPixels; ++p) sum[g][p] = start;
  }

  ForEachKeptWeight<T>(a, source, n, group, shared,
                       [&](auto code, float weight, const float (&window)[T::kWindow])
                           LIPFAST_INLINE { Accumulate<T, decltype(code)::value>(weight, window, sum); });
  StoreTile<T>(a, n, group, corner, sum);
}

// One kept weight's products over this thread's pixels, in four chains so that
// multiply-adds of one weight overlap. `zero` comes from the list: a constant
// would let the compiler hoist the products of *all* weights out of the loop.
template <class T, int CODE>
__device__ __forceinline__ float Dot(float zero, const float (&window)[T::kWindow],
                                     const float (&dy)[T::kGroup][T::kPixels]) {
  constexpr int kChannel = CODE / T::kTaps, kTap = CODE % T::kTaps;
  constexpr int kChains = 4;
  float chain[kChains] = {zero, zero, zero, zero};
#pragma unroll
  for (int p = 0; p < T::kPixels; ++p) {
    const int w = T::WindowIndex(kTap, p / T::kColumns, p % T::kColumns);
    chain[p % kChains] = fmaf(dy[kChannel][p], window[w], chain[p % kChains]);
  }
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

template <class T>
__device__ inline void LoadTile(const LipfastSparseConv& a, int n, int group, const Corner<T>& corner,
                                float (&dy)[T::kGroup][T::kPixels]) {
  const int lane = threadIdx.x % kWarp;
  const int row0 = corner.row + lane / kLanesAcross * T::kRows;
  const int column0 = corner.column + lane % kLanesAcross * T::kColumns;
#pragma unroll
  for (int g = 0; g < T::kGroup; ++g) {
    const int channel = group * T::kGroup + g;
    const float* plane = a.y + (static_cast<size_t>(n) * a.output_channels + channel) * a.y_rows * a.y_columns;
#pragma unroll
    for (int p = 0; p < T::kPixels; ++p) {
      const int row = row0 + p / T::kColumns, column = column0 + p % T::kColumns;
      const bool inside = channel < a.output_channels && row < a.y_rows && column < a.y_columns;
      dy[g][p] = inside ? plane[row * a.y_columns + column] : 0.0f;
    }
  }
}

// Per-warp transpose buffer: a row per list entry, a column per lane. The odd
// pitch keeps both directions free of bank conflicts.
constexpr int kSumPitch = kWarp + 1;
constexpr size_t kSumBytes = sizeof(float) * kWarps * kWarp * kSumPitch;

// Adds up the first `count` rows of a warp's transpose buffer, one per lane,
// into the partial sums of list entries [position, position + count).
__device__ inline void FlushSums(const float* sums, int count, bool first, float* partial, int position) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // all lanes have stored
  if (lane < count) {
    float total = first ? 0.0f : partial[position + lane];
#pragma unroll
    for (int i = 0; i < kWarp; ++i) total += sums[lane * kSumPitch + i];
    partial[position + lane] = total;
  }
  __syncwarp();  // all lanes have read: the rows may be overwritten
}

// Grid: (splits, groups / kWarps). Each block walks over its share of the
// (item, tile) pairs in order, so a sum has one order, whatever runs when.
//
// The 32 lane sums of a weight do not go through five shuffles: 32 weights are
// stored row by row in shared memory, then each lane adds up one weight.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) WeightGradientKernel(const LipfastSparseConv a) {
  LIPFAST_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = blockIdx.y * kWarps + warp;
  if (blockIdx.x >= a.splits) return;
  float* sums = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + T::kSharedBytes) + warp * kWarp * kSumPitch;
  float* partial = a.partial + static_cast<size_t>(blockIdx.x) * a.kept;

  const int across = (a.y_columns + T::kTileColumns - 1) / T::kTileColumns;
  const int down = (a.y_rows + T::kTileRows - 1) / T::kTileRows;
  const int tiles = across * down;
  for (int job = blockIdx.x; job < tiles * a.batch; job += a.splits) {
    const int n = job / tiles;
    const Corner<T> corner(job - n * tiles, a.y_columns);
    const Source<T> source(a, corner.row, corner.column);
    float dy[T::kGroup][T::kPixels];
    LoadTile<T>(a, n, group, corner, dy);

    const bool first = job == static_cast<int>(blockIdx.x);
    int position = group * T::kGroup < a.output_channels ? a.starts[group * a.input_channels] : 0;
    int pending = 0;
    ForEachKeptWeight<T>(a, source, n, group, shared,
                         [&](auto code, float zero, const float (&window)[T::kWindow]) LIPFAST_INLINE {
                           sums[pending * kSumPitch + lane] = Dot<T, decltype(code)::value>(zero, window, dy);
                           if (++pending == kWarp) {
                             FlushSums(sums, kWarp, first, partial, position);
                             position += kWarp;
                             pending = 0;
                           }
                         });
    FlushSums(sums, pending, first, partial, position);
  }
}

// gradient[slots[e]] = sum of the partial sums of entry e, in split order.
__global__ void __launch_bounds__(kThreads)
    AddSplitsKernel(const float* __restrict__ partial, const int32_t* __restrict__ slots, int kept, int splits,
                    float* __restrict__ gradient) {
  const int e = blockIdx.x * kThreads + threadIdx.x;
  if (e >= kept) return;
  float total = 0.0f;
  for (int s = 0; s < splits; ++s) {
    total += partial[static_cast<size_t>(s) * kept + e];
  }
  gradient[slots[e]] = total;
}

unsigned Ceil(int size, int step) { return (size + step - 1) / step; }

cudaError_t LaunchPack(const LipfastSparseConv& a, cudaStream_t stream) {
  return LIPFAST_LAUNCH(PackKernel, dim3(Ceil(a.kept, kThreads)), dim3(kThreads), 0, stream, a.codes, a.slots, a.values,
                        a.kept, static_cast<int2*>(a.packed));
}

template <class T>
unsigned TileCount(const LipfastSparseConv& a) {
  return Ceil(VirtualSize<T>(a.y_rows, a.output_offset), T::kTileRows) *
         Ceil(VirtualSize<T>(a.y_columns, a.output_offset), T::kTileColumns);
}

template <class T>
unsigned GroupBlocks(const LipfastSparseConv& a) {
  return Ceil(a.output_channels, T::kGroup * kWarps);
}

// More shared memory than 48 KB must be asked for.
template <class Kernel>
cudaError_t AllowShared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class T>
cudaError_t LaunchForward(const LipfastSparseConv& a, cudaStream_t stream) {
  const auto kernel = SparseConvKernel<T>;
  const cudaError_t status = AllowShared(kernel, T::kSharedBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(TileCount<T>(a), GroupBlocks<T>(a), a.batch);
  return LIPFAST_LAUNCH(kernel, grid, dim3(kThreads), T::kSharedBytes, stream, a);
}

template <class T>
cudaError_t LaunchWeightGradient(const LipfastSparseConv& a, cudaStream_t stream) {
  constexpr size_t kBytes = T::kSharedBytes + kSumBytes;
  const auto kernel = WeightGradientKernel<T>;
  const cudaError_t status = AllowShared(kernel, kBytes);
  if (status != cudaSuccess) return status;
  return LIPFAST_LAUNCH(kernel, dim3(a.splits, GroupBlocks<T>(a)), dim3(kThreads), kBytes, stream, a);
}

template <class Large, class Small>
LipfastGeometryFacts Facts() {
  static_assert(Large::kGroup == Small::kGroup && Large::kTaps == Small::kTaps && Large::kStage == Small::kStage,
                "both tiles read the same lists");
  return {Large::kGroup,
          Large::kTaps,
          Large::kTapColumns,
          Large::kStage,
          {Large::kTileRows, Small::kTileRows},
          {Large::kTileColumns, Small::kTileColumns}};
}

}  // namespace lipfast

extern "C" {

int lipfast_cuda_abi(void) { return 1000 + sizeof(LipfastSparseConv); }

int lipfast_cuda_devices(int32_t* count) {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  *count = devices;
  return status;
}

const char* lipfast_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int lipfast_geometry_facts(int32_t geometry, LipfastGeometryFacts* facts) {
  using namespace lipfast;
  switch (geometry) {
    case kLipfastPoint:
      *facts = Facts<PointLarge, PointSmall>();
      return cudaSuccess;
    case kLipfastSame:
      *facts = Facts<SameLarge, SameSmall>();
      return cudaSuccess;
    case kLipfastHalf:
      *facts = Facts<HalfLarge, HalfSmall>();
      return cudaSuccess;
    case kLipfastDouble:
      *facts = Facts<DoubleLarge, DoubleSmall>();
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

int lipfast_sparse_conv(const LipfastSparseConv* args, int32_t device, void* stream_pointer) {
  using namespace lipfast;
  const LipfastSparseConv& a = *args;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess && a.kept > 0) status = LaunchPack(a, stream);
  if (status != cudaSuccess) return status;
  switch (a.geometry) {
    case kLipfastPoint:
      return a.small_tile ? LaunchForward<PointSmall>(a, stream) : LaunchForward<PointLarge>(a, stream);
    case kLipfastSame:
      return a.small_tile ? LaunchForward<SameSmall>(a, stream) : LaunchForward<SameLarge>(a, stream);
    case kLipfastHalf:
      return a.small_tile ? LaunchForward<HalfSmall>(a, stream) : LaunchForward<HalfLarge>(a, stream);
    case kLipfastDouble:
      return a.small_tile ? LaunchForward<DoubleSmall>(a, stream) : LaunchForward<DoubleLarge>(a, stream);
  }
  return cudaErrorInvalidValue;
}

int lipfast_sparse_conv_weight_gradient(const LipfastSparseConv* args, int32_t device, void* stream_pointer) {
  using namespace lipfast;
  const LipfastSparseConv& a = *args;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (a.kept == 0) return cudaSuccess;
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) status = LaunchPack(a, stream);
  if (status != cudaSuccess) return status;
  switch (a.geometry) {
    case kLipfastPoint:
      status = a.small_tile ? LaunchWeightGradient<PointSmall>(a, stream) : LaunchWeightGradient<PointLarge>(a, stream);
      break;
    case kLipfastSame:
      status = a.small_tile ? LaunchWeightGradient<SameSmall>(a, stream) : LaunchWeightGradient<SameLarge>(a, stream);
      break;
    case kLipfastHalf:
      status = a.small_tile ? LaunchWeightGradient<HalfSmall>(a, stream) : LaunchWeightGradient<HalfLarge>(a, stream);
      break;
    default:  // a gradient of an input gradient is never asked for
      status = cudaErrorInvalidValue;
  }
  if (status != cudaSuccess) return status;
  return LIPFAST_LAUNCH(AddSplitsKernel, dim3(Ceil(a.kept, kThreads)), dim3(kThreads), 0, stream, a.partial, a.slots,
                        a.kept, a.splits, a.gradient);
}

}  // extern "C"
