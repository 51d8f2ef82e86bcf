#include "cpu/pair.h"

#include <memory>

#include "cpu/arena.h"
#include "cpu/halo.h"
#include "cpu/pool.h"

namespace lipfast {
namespace LIPFAST_NS {

extern const TapKernels tap_kernels;
extern const PointwiseKernels pointwise_kernels;

namespace {

constexpr int64_t kParts = 16;  // of the channels, as in sparse_accumulate

// A thread's room for the channels between the two.
float* Room(int64_t floats) {
  static thread_local std::unique_ptr<Arena> room;
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  if (!room || room->bytes() < bytes) {
    room.reset();
    room = std::make_unique<Arena>(bytes);
  }
  return room->data();
}

// Channels [first, last) of one convolution, and what follows them; `made` is where they lie.
void Make(const Region& region, const PairPart& part, int64_t first, int64_t last, const LaneMap& made,
          const HaloFiller* filler) {
  const bool simple = IsSimple(part.act.kind);
  const ActivationSpec stored = simple ? part.act : ActivationSpec{};
  if (part.dense) {
    tap_kernels.dense_outputs(region, *part.dense, part.values, part.bias, stored, first, last);
  } else {
    tap_kernels.sparse_outputs(region, *part.sparse, part.values, part.bias, stored, first, last);
  }
  if (!simple) pointwise_kernels.activate(made, made, part.act, 1);
  for (int64_t c = 0; filler && c < made.channels; ++c) filler->Fill(made.At(0, c));
}

// Some channels of one sheet, which lie at `data`.
LaneMap Part(const LaneMap& whole, float* data, int64_t channels) {
  LaneMap part = whole;
  part.data = data;
  part.batch = 1;
  part.channels = channels;
  return part;
}

void Run(const Region* first, const Region* second, int64_t sheets, const PairPart& one, const PairPart& two,
         const LaneMap& between, const HaloSpec& halo, const LaneMap& y, const HaloSpec& y_halo, int threads) {
  const int64_t channels = two.sparse->outputs, unit = one.dense ? tap_kernels.dense_group : 1;
  const int64_t units = (channels + unit - 1) / unit, parts = units < kParts ? units : kParts;
  const HaloFiller filler(between, halo.padding, halo.pad), y_filler(y, y_halo.padding, y_halo.pad);
  ParallelFor(threads, sheets * parts, [&](int64_t chunk) {
    const int64_t sheet = chunk / parts, part = chunk % parts;
    const int64_t begin = units * part / parts * unit, next = units * (part + 1) / parts * unit;
    const int64_t end = next < channels ? next : channels;
    float* room = Room((end - begin) * between.channel_stride);
    float* pixels = room + between.halo * (between.row_stride + kLanes);
    Region in = first[sheet], out = second[sheet];
    in.out = pixels - begin * between.channel_stride;
    out.in = in.out;
    Make(in, one, begin, end, Part(between, pixels, end - begin), halo.fill ? &filler : nullptr);
    Make(out, two, begin, end, Part(y, y.At(sheet, begin), end - begin), y_halo.fill ? &y_filler : nullptr);
  });
}

}  // namespace

extern const PairKernels pair_kernels;
const PairKernels pair_kernels = {Run};

}  // namespace LIPFAST_NS
}  // namespace lipfast
