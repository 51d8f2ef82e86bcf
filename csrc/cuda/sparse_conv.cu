// See sparse_conv.h for the interface and tile.cuh for how work is cut.
#include "tile.cuh"

namespace lipfast {

// Tile<warps, lists, rows, stage> of each size, the fastest of those timed on an
// H100 for 128 channels: large at 128 x 128 pixels, medium at 64, small at 32.
template <int SIZE>
struct Sized;
template <>
struct Sized<0> {
  using Convolution = Tile<16, 4, 8, 32>;
  using WeightGradient = Tile<16, 2, 16, 12>;
};
template <>
struct Sized<1> {
  using Convolution = Tile<16, 2, 4, 32>;
  using WeightGradient = Tile<16, 1, 8, 16>;
};
template <>
struct Sized<2> {
  using Convolution = Tile<16, 1, 2, 32>;
  using WeightGradient = Tile<16, 1, 2, 16>;
};

// A warp's entries with their weights, two at a time, through shared memory: one
// 128-bit load serves the warp for 32 pairs, and the next is in flight.
class WeightedPairs {
 public:
  __device__ WeightedPairs(const int4* pairs, const float* values, int4* chunk)
      : next_(pairs + threadIdx.x % kWarp),
        values_(values),
        chunk_(chunk + threadIdx.x / kWarp * kWarp),
        at_(chunk_ + kWarp),
        ahead_(*next_) {}

  // (offset, weight, offset, weight).
  __device__ __forceinline__ int4 Take() {
    if (at_ == chunk_ + kWarp) {
      ahead_.y = Weight(ahead_.y);
      ahead_.w = Weight(ahead_.w);
      __syncwarp();  // all lanes have read the last pair
      chunk_[threadIdx.x % kWarp] = ahead_;
      __syncwarp();  // all lanes have stored theirs
      next_ += kWarp;
      ahead_ = *next_;
      at_ = chunk_;
    }
    return *at_++;
  }

 private:
  __device__ __forceinline__ int Weight(int slot) const { return slot < 0 ? 0 : __float_as_int(values_[slot]); }

  const int4* next_;
  const float* values_;
  int4* chunk_;
  const int4* at_;
  int4 ahead_;
};

// A warp's entries straight from memory, one pair ahead.
class Pairs {
 public:
  __device__ explicit Pairs(const int4* pairs) : next_(pairs), ahead_(*pairs) {}

  // (offset, slot, offset, slot).
  __device__ __forceinline__ int4 Take() {
    const int4 pair = ahead_;
    ahead_ = *++next_;
    return pair;
  }

 private:
  const int4* next_;
  int4 ahead_;
};

// How many entries each of a warp's lists has in a stage, read one stage ahead.
template <class T>
class Counts {
 public:
  __device__ Counts(const LipfastSparseConv& a, int warp)
      : next_(a.counts + static_cast<size_t>(warp) * a.stages * T::kLists) {
    Read();
  }

  __device__ __forceinline__ void Take(int (&count)[T::kLists]) {
#pragma unroll
    for (int g = 0; g < T::kLists; ++g) count[g] = ahead_[g];
    Read();
  }

 private:
  __device__ __forceinline__ void Read() {
#pragma unroll
    for (int g = 0; g < T::kLists; ++g) ahead_[g] = next_[g];
    next_ += T::kLists;
  }

  const int32_t* next_;
  int ahead_[T::kLists];
};

template <class T>
__device__ __forceinline__ void Accumulate(const char* staged, int offset, int weight_bits, float (&sum)[T::kRows]) {
  const float* pixel = reinterpret_cast<const float*>(staged + offset);
  const float weight = __int_as_float(weight_bits);
#pragma unroll
  for (int r = 0; r < T::kRows; ++r) sum[r] = fmaf(weight, pixel[r * kPitch], sum[r]);
}

// Grid: (tiles * groups, 1, batch), the groups of output channels of a tile side
// by side: they read the same pixels.
template <class T>
__global__ void __launch_bounds__(T::kThreads) SparseConvKernel(const LipfastSparseConv a) {
  LIPFAST_DYNAMIC_SHARED(memory);
  const Shared<T> shared(a, memory);
  const int lane = threadIdx.x % kWarp;
  const int groups = a.list_warps / T::kWarps;
  const int warp = blockIdx.x % groups * T::kWarps + threadIdx.x / kWarp;
  const int n = blockIdx.z;
  const Corner<T> corner(blockIdx.x / groups, (a.y_columns + a.left_cut + a.column_scale - 1) / a.column_scale);
  const int classes = a.row_scale * a.column_scale;
  PrepareStages<T>(a, shared, corner.row, corner.column);

  float sum[T::kLists][T::kRows];
#pragma unroll
  for (int g = 0; g < T::kLists; ++g) {
    const int output = a.outputs[warp * T::kLists + g];
    const float start = a.bias != nullptr && output >= 0 ? a.bias[output / classes] : 0.0f;
#pragma unroll
    for (int r = 0; r < T::kRows; ++r) sum[g][r] = start;
  }

  WeightedPairs entries(reinterpret_cast<const int4*>(a.entries) + a.begins[warp] / 2, a.values, shared.pairs);
  Counts<T> counts(a, warp);
  __syncthreads();  // the sources are known
  ForEachStage<T>(a, shared, n, [&](const float* stage) LIPFAST_INLINE {
    const char* staged = reinterpret_cast<const char*>(stage + lane);
    int count[T::kLists];
    counts.Take(count);
#pragma unroll
    for (int g = 0; g < T::kLists; ++g) {
#pragma unroll 1
      for (int pairs = count[g] / 2; pairs > 0; --pairs) {
        const int4 pair = entries.Take();
        Accumulate<T>(staged, pair.x, pair.y, sum[g]);
        Accumulate<T>(staged, pair.z, pair.w, sum[g]);
      }
      if (count[g] % 2 != 0) {
        const int4 pair = entries.Take();
        Accumulate<T>(staged, pair.x, pair.y, sum[g]);
      }
    }
  });

#pragma unroll
  for (int g = 0; g < T::kLists; ++g) {
    const int output = a.outputs[warp * T::kLists + g];
    if (output < 0) continue;
    const int parity_row = output % classes / a.column_scale, parity_column = output % a.column_scale;
    const int column = (corner.column + lane) * a.column_scale + parity_column - a.left_cut;
    if (column < 0 || column >= a.y_columns) continue;
    float* to = a.y + (static_cast<size_t>(n) * a.y_channels + output / classes) * a.y_rows * a.y_columns + column;
#pragma unroll
    for (int r = 0; r < T::kRows; ++r) {
      const int row = (corner.row + r) * a.row_scale + parity_row - a.top_cut;
      if (row >= 0 && row < a.y_rows) to[static_cast<size_t>(row) * a.y_columns] = sum[g][r];
    }
  }
}

// One kept weight's products over this lane's pixels, in two chains that overlap.
template <class T>
__device__ __forceinline__ float Dot(const char* staged, int offset, const float (&dy)[T::kRows]) {
  const float* pixel = reinterpret_cast<const float*>(staged + offset);
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int r = 0; r < T::kRows; r += 2) {
    even = fmaf(dy[r], pixel[r * kPitch], even);
    odd = fmaf(dy[r + 1], pixel[(r + 1) * kPitch], odd);
  }
  return even + odd;
}

// Per-warp transpose buffer: a row per list entry, a column per lane. The odd
// pitch keeps both directions free of bank conflicts.
constexpr int kSumRows = kWarp / 2;
constexpr int kSumPitch = kWarp + 1;
template <class T>
constexpr int kSumBytes = static_cast<int>(sizeof(float)) * T::kWarps * kSumRows * kSumPitch;

// Adds up the first `count` rows of a warp's transpose buffer, two lanes to a row,
// into its partial sums.
__device__ inline void FlushSums(const float* sums, int count, bool first, float* partial) {
  const int row = threadIdx.x % kSumRows, half = threadIdx.x % kWarp / kSumRows;
  __syncwarp();  // all lanes have stored
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kSumRows; ++i) total += sums[row * kSumPitch + half * kSumRows + i];
  total += __shfl_sync(kFullWarp, total, row + (1 - half) * kSumRows);
  if (half == 0 && row < count) partial[row] = first ? total : partial[row] + total;
  __syncwarp();  // all lanes have read: the rows may be overwritten
}

// Grid: (list_warps / kWarps, splits). Each block walks over its share of the
// (item, tile) pairs in order, so a sum has one order, whatever runs when.
//
// The 32 lane sums of a weight do not go through five shuffles: 16 weights are
// stored row by row in shared memory, then two lanes add up each.
template <class T>
__global__ void __launch_bounds__(T::kThreads) WeightGradientKernel(const LipfastSparseConv a) {
  LIPFAST_DYNAMIC_SHARED(memory);
  const Shared<T> shared(a, memory);
  const int lane = threadIdx.x % kWarp;
  const int warp = blockIdx.x * T::kWarps + threadIdx.x / kWarp;
  const int split = blockIdx.y;
  float* sums = shared.rest + threadIdx.x / kWarp * kSumRows * kSumPitch;
  const int tiles = (a.y_columns + kWarp - 1) / kWarp * ((a.y_rows + T::kRows - 1) / T::kRows);

#pragma unroll 1
  for (int job = split; job < tiles * a.batch; job += a.splits) {
    const int n = job / tiles;
    const Corner<T> corner(job - n * tiles, a.y_columns);
    __syncthreads();  // nobody reads the tile before any more
    PrepareStages<T>(a, shared, corner.row, corner.column);

    float dy[T::kLists][T::kRows];
#pragma unroll
    for (int g = 0; g < T::kLists; ++g) {
      const int output = a.outputs[warp * T::kLists + g];
      const float* plane = a.y + (static_cast<size_t>(n) * a.y_channels + output) * a.y_rows * a.y_columns;
      const int column = corner.column + lane;
#pragma unroll
      for (int r = 0; r < T::kRows; ++r) {
        const int row = corner.row + r;
        const bool inside = output >= 0 && row < a.y_rows && column < a.y_columns;
        dy[g][r] = inside ? plane[static_cast<size_t>(row) * a.y_columns + column] : 0.0f;
      }
    }

    Pairs entries(reinterpret_cast<const int4*>(a.entries) + a.begins[warp] / 2);
    float* partial = a.partial + static_cast<size_t>(split) * a.listed + a.begins[warp];
    const bool first = job == split;
    int pending = 0;
    Counts<T> counts(a, warp);
    __syncthreads();  // the sources are known
    ForEachStage<T>(a, shared, n, [&](const float* stage) LIPFAST_INLINE {
      const char* staged = reinterpret_cast<const char*>(stage + lane);
      int count[T::kLists];
      counts.Take(count);
#pragma unroll
      for (int g = 0; g < T::kLists; ++g) {
#pragma unroll 1
        for (int left = count[g]; left > 0; left -= 2) {
          const int4 pair = entries.Take();
          float* row = sums + pending * kSumPitch + lane;
          row[0] = Dot<T>(staged, pair.x, dy[g]);
          row[kSumPitch] = left > 1 ? Dot<T>(staged, pair.z, dy[g]) : 0.0f;
          pending += 2;
          if (pending == kSumRows) {
            FlushSums(sums, kSumRows, first, partial);
            partial += kSumRows;
            pending = 0;
          }
        }
      }
    });
    FlushSums(sums, pending, first, partial);
  }
}

// gradient[slot of e] = sum of the partial sums of entry e, in split order.
constexpr int kFlatThreads = 128;
__global__ void __launch_bounds__(kFlatThreads)
    AddSplitsKernel(const float* __restrict__ partial, const int2* __restrict__ entries, int listed, int splits,
                    float* __restrict__ gradient) {
  const int e = blockIdx.x * kFlatThreads + threadIdx.x;
  if (e >= listed || entries[e].y < 0) return;
  float total = 0.0f;
  for (int s = 0; s < splits; ++s) {
    total += partial[static_cast<size_t>(s) * listed + e];
  }
  gradient[entries[e].y] = total;
}

unsigned Ceil(int size, int step) { return (size + step - 1) / step; }

// More shared memory than 48 KB must be asked for.
template <class Kernel>
cudaError_t AllowShared(Kernel kernel, int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <class T>
cudaError_t LaunchConvolution(const LipfastSparseConv& a, cudaStream_t stream) {
  const auto kernel = SparseConvKernel<T>;
  const int bytes = T::SharedBytes(a.halo_rows, a.row_phases * a.column_phases);
  const cudaError_t status = AllowShared(kernel, bytes);
  if (status != cudaSuccess) return status;
  const unsigned tiles = Ceil(Ceil(a.y_rows + a.top_cut, a.row_scale), T::kRows) *
                         Ceil(Ceil(a.y_columns + a.left_cut, a.column_scale), kWarp);
  const dim3 grid(tiles * (a.list_warps / T::kWarps), 1, a.batch);
  return LIPFAST_LAUNCH(kernel, grid, dim3(T::kThreads), bytes, stream, a);
}

template <class T>
constexpr int GradientBytes(int halo_rows, int phases) {
  return T::SharedBytes(halo_rows, phases) + kSumBytes<T>;
}

template <class T>
cudaError_t LaunchWeightGradient(const LipfastSparseConv& a, cudaStream_t stream) {
  const auto kernel = WeightGradientKernel<T>;
  const int bytes = GradientBytes<T>(a.halo_rows, a.row_phases * a.column_phases);
  const cudaError_t status = AllowShared(kernel, bytes);
  if (status != cudaSuccess) return status;
  return LIPFAST_LAUNCH(kernel, dim3(a.list_warps / T::kWarps, a.splits), dim3(T::kThreads), bytes, stream, a);
}

// Calls run(Sized<size>()); `fallback` for an unknown size.
template <class Run, class Result>
Result WithSize(int size, Result fallback, Run run) {
  switch (size) {
    case 0:
      return run(Sized<0>());
    case 1:
      return run(Sized<1>());
    case 2:
      return run(Sized<2>());
  }
  return fallback;
}

template <class T>
LipfastTileFacts FactsOf() {
  return {T::kWarps, T::kLists, T::kRows, T::kStage, kPitch};
}

}  // namespace lipfast

extern "C" {

int lipfast_cuda_abi(void) { return 2000 + sizeof(LipfastSparseConv); }

int lipfast_cuda_devices(int32_t* count) {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  *count = devices;
  return status;
}

const char* lipfast_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int lipfast_tile_facts(int32_t kernel, int32_t size, LipfastTileFacts* facts) {
  using namespace lipfast;
  return WithSize(size, cudaErrorInvalidValue, [&](auto sized) {
    using S = decltype(sized);
    if (kernel != kLipfastConvolution && kernel != kLipfastWeightGradient) return cudaErrorInvalidValue;
    *facts = kernel == kLipfastConvolution ? FactsOf<typename S::Convolution>() : FactsOf<typename S::WeightGradient>();
    return cudaSuccess;
  });
}

int lipfast_shared_bytes(int32_t kernel, int32_t size, int32_t halo_rows, int32_t phases) {
  using namespace lipfast;
  return WithSize(size, 0, [&](auto sized) {
    using S = decltype(sized);
    if (kernel == kLipfastConvolution) return S::Convolution::SharedBytes(halo_rows, phases);
    if (kernel == kLipfastWeightGradient) return GradientBytes<typename S::WeightGradient>(halo_rows, phases);
    return 0;
  });
}

int lipfast_sparse_conv(const LipfastSparseConv* args, int32_t device, void* stream_pointer) {
  using namespace lipfast;
  const LipfastSparseConv& a = *args;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  return WithSize(a.size, cudaErrorInvalidValue,
                  [&](auto sized) { return LaunchConvolution<typename decltype(sized)::Convolution>(a, stream); });
}

int lipfast_sparse_conv_weight_gradient(const LipfastSparseConv* args, int32_t device, void* stream_pointer) {
  using namespace lipfast;
  const LipfastSparseConv& a = *args;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  status = WithSize(a.size, cudaErrorInvalidValue, [&](auto sized) {
    return LaunchWeightGradient<typename decltype(sized)::WeightGradient>(a, stream);
  });
  if (status != cudaSuccess) return status;
  return LIPFAST_LAUNCH(AddSplitsKernel, dim3(Ceil(a.listed, kFlatThreads)), dim3(kFlatThreads), 0, stream, a.partial,
                        reinterpret_cast<const int2*>(a.entries), a.listed, a.splits, a.gradient);
}

}  // extern "C"
