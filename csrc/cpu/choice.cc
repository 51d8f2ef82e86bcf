#include "cpu/choice.h"

#include "cpu/isa.h"
#include "cpu/winograd.h"

namespace lipfast {
namespace {

// What the kernels' times are made of, in nanoseconds of one core of an Emerald Rapids server, for
// AVX-512 in halves of a Zen 4 one; only ratios matter. Fitted by benchmarks/fit_choice.py
// (docs/kernels.md, "Choice").
struct Costs {
  double sparse_tap, sparse_sum, sparse_weight;  // tap x vector, output x vector, weight to re-order
  double winograd_product, winograd_transform;   // product of two frequencies, vector of a frequency
  double winograd_weight;                        // frequency of a filter
  double dense_tap, dense_weight;                // as for sparse
};
struct Model {
  Costs costs[3];  // forward, input gradient, weight gradient
  // Filters in frequencies of more bytes come from memory, every time, and cost so many times more.
  double last_level, from_memory;
};
constexpr Model kAvx2 = {{{0.473, 8.66, 1.69, 0.481, 3.21, 0.736, 0.530, 0.764},
                          {0.474, 8.81, 2.29, 0.490, 3.10, 0.854, 0.520, 2.62},
                          {0.689, 7.33, 2.90, 0.472, 4.40, 0.519, 0.442, 3.59}},
                         16 << 20,
                         2.0};
constexpr Model kAvx512 = {{{0.275, 9.01, 1.21, 0.234, 3.09, 0.725, 0.237, 0.759},
                            {0.270, 8.72, 1.58, 0.224, 2.77, 0.896, 0.235, 2.85},
                            {0.322, 10.0, 2.02, 0.257, 4.75, 0.468, 0.259, 3.99}},
                           12 << 20,
                           2.0};
// Here what Winograd takes for its filters (0.248, 0.305, 0.252 fitted) and for the products of weight
// gradients (0.301) is more than fitted on one core: where two share no cache, it alone takes longer
// by half, so what is nearly as fast by another kernel takes that. Filters from memory cost 1.4 times
// that and not twice, which is about what they took.
constexpr Model kHalves = {{{0.342, 3.17, 0.575, 0.293, 2.18, 0.430, 0.294, 0.640},
                            {0.338, 3.16, 1.12, 0.286, 2.21, 0.470, 0.293, 0.952},
                            {0.368, 3.36, 1.07, 0.340, 2.53, 0.350, 0.280, 2.56}},
                           12 << 20,
                           1.4};

const Model& ModelOfIsa() {
  if (ActiveIsa() != Isa::kAvx512) return kAvx2;  // plain C++, too
  return Avx512InHalves() ? kHalves : kAvx512;
}

// In a picture of fewer pixels few taps of a 5x5 kernel reach any; the rounding of the others would exceed 1e-5 of the
// result.
constexpr int64_t kLeastSideOfFive = 4;

bool WinogradPossible(const ConvShape& s, const ConvGeometry& g) {
  const bool large = g.height >= kLeastSideOfFive && g.width >= kLeastSideOfFive;
  const bool three = s.kernel_h == 3 && s.stride <= 2, five = s.kernel_h == 5 && s.stride == 1 && large;
  const bool same = s.pad_h == s.kernel_h / 2 && s.pad_w == s.pad_h;
  return (three || five) && s.kernel_w == s.kernel_h && same && s.dilation == 1 && s.groups == 1;
}

// How much one direction does: positions of the output, vectors it writes, weights it keeps
// and has; of Winograd products x tiles, pairs of channels and channels of both maps, frequencies of a filter.
struct Work {
  double positions, out_vectors, kept, filters;
  double products, pairs, channels, frequencies;
};

Work WorkOf(const ConvShape& s, const ConvGeometry& g, int64_t kept, ConvDirection direction) {
  const double positions = static_cast<double>(g.batch * g.out_block_h * g.out_block_w);
  const bool backward = direction == ConvDirection::kInputGradient;
  const int tile = WinogradTile(g.out_block_h, g.out_block_w, s.kernel_h, s.stride);
  const int64_t tiles = g.batch * ((g.out_block_h + tile - 1) / tile) * ((g.out_block_w + tile - 1) / tile);
  Work work = {};
  work.positions = positions;
  work.out_vectors = positions * static_cast<double>(backward ? s.stride * s.stride * s.in_channels : s.out_channels);
  work.kept = static_cast<double>(kept);
  work.filters = static_cast<double>(s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w);
  work.products = static_cast<double>(tiles * WinogradProducts(tile, s.kernel_h, s.stride));
  work.pairs = static_cast<double>(s.out_channels * s.in_channels);
  work.channels = static_cast<double>(s.in_channels + s.out_channels);
  work.frequencies = static_cast<double>(WinogradSide(tile, s.kernel_h) * WinogradSide(tile, s.kernel_h));
  return work;
}

double SparseCost(const Costs& c, const Work& w) {
  return c.sparse_tap * w.positions * w.kept + c.sparse_sum * w.out_vectors + c.sparse_weight * w.kept;
}

double DenseCost(const Costs& c, const Work& w) {
  return c.dense_tap * w.positions * w.filters + c.dense_weight * w.filters;
}

double WinogradCost(const Model& model, const Costs& c, const Work& w) {
  const double weights = w.pairs * w.frequencies;
  const double far = weights * sizeof(float) > model.last_level ? model.from_memory : 1.0;
  return w.products * (c.winograd_product * w.pairs + c.winograd_transform * w.channels) +
         far * c.winograd_weight * weights;
}

}  // namespace

ConvKernel ChooseKernel(ConvKernel asked, const ConvShape& shape, const ConvGeometry& geometry, int64_t kept,
                        ConvDirection direction, bool exact) {
  if (shape.groups > 1 || asked == ConvKernel::kSparse) return ConvKernel::kSparse;
  const bool winograd = WinogradPossible(shape, geometry) && !exact;
  if (asked == ConvKernel::kDense || (asked == ConvKernel::kWinograd && winograd)) return asked;
  const Model& model = ModelOfIsa();
  const Costs& costs = model.costs[static_cast<int>(direction)];
  const Work work = WorkOf(shape, geometry, kept, direction);
  const double sparse = SparseCost(costs, work), dense = DenseCost(costs, work);
  // A list of all weights would take 12 to 16 bytes for each in each direction, whatever time it saves on a tiny map.
  const bool mostly = work.kept == work.filters || dense < sparse;
  if (winograd && WinogradCost(model, costs, work) < (mostly ? dense : sparse)) return ConvKernel::kWinograd;
  return mostly ? ConvKernel::kDense : ConvKernel::kSparse;
}

}  // namespace lipfast
