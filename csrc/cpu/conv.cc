#include "cpu/conv.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/border.h"
#include "cpu/choice.h"
#include "cpu/isa.h"
#include "cpu/pair.h"
#include "cpu/pass.h"
#include "cpu/pool.h"
#include "cpu/winograd.h"

namespace lipfast {
namespace {

const char* Name(ConvKernel kernel) {
  return kernel == ConvKernel::kSparse ? "sparse" : kernel == ConvKernel::kWinograd ? "winograd" : "dense";
}

}  // namespace

struct Conv::Impl {
  ConvShape shape;
  ConvGeometry geometry;
  int64_t out_h, out_w;
  int64_t kept;
  std::vector<int32_t> weights;  // packed order -> position in the dense weight; empty where all are kept
  ConvKernel forward, input_gradient, weight_gradient;
  Pass forward_pass, weight_pass;
  bool shares_taps;                                    // weight_pass stays empty: forward_pass is the same
  std::vector<std::unique_ptr<Pass>> gradient_passes;  // of the input gradient, unless Winograd does it
  std::unique_ptr<Border> border;                      // and of the padding
  int64_t gradient_halo;
  int tile;  // of Winograd

  // Where Winograd runs; no groups.
  int64_t DenseWeightFloats() const { return shape.out_channels * shape.in_channels * shape.kernel_h * shape.kernel_w; }
  bool dense() const { return kept == DenseWeightFloats(); }
  int32_t FlatIndex(int64_t packed) const { return weights.empty() ? static_cast<int32_t>(packed) : weights[packed]; }
  void Scatter(const float* values, float* dense, int threads) const;
  int64_t TransformedFloats() const {
    return RoundUp(WinogradWeightFloats(shape.out_channels, shape.in_channels, tile, shape.kernel_h));
  }
  const WinogradKernels& Winograd() const { return WinogradKernelsOf(shape.kernel_h, shape.stride); }
  void Transform(bool transposed, const float* values, float* transformed, float* scratch, int threads) const;
  void AccumulateGradient(const Pass& pass, const float* values, const LaneMap& dy, const LaneMap& dx, float* scratch,
                          int threads) const;
  LaneMap Sketch(bool input) const;
  void CheckSizes();
  std::vector<Weight> ListWeights(const uint8_t* mask);
  // `taps`: false where Winograd runs, which needs none.
  void BuildForward(Pass* pass, const std::vector<Weight>& placed, bool taps, bool dense) const;
  void BuildInputGradient(const std::vector<Weight>& placed, bool dense_border);
  // One phase of the stride.
  void AddGradientPass(const std::vector<Weight>& placed, int64_t phase_row, int64_t phase_col);
  int64_t ScratchFloats(int threads) const;
};

void Conv::Impl::CheckSizes() {
  const int64_t reach_h = shape.dilation * (shape.kernel_h - 1), reach_w = shape.dilation * (shape.kernel_w - 1);
  out_h = OutSide(geometry.height, shape.pad_h, shape.kernel_h, shape);
  out_w = OutSide(geometry.width, shape.pad_w, shape.kernel_w, shape);
  if (out_h < 1 || out_w < 1) {
    throw std::invalid_argument("conv: a picture of " + std::to_string(geometry.height) + " x " +
                                std::to_string(geometry.width) + " pixels is smaller than the kernel of " +
                                std::to_string(reach_h + 1) + " x " + std::to_string(reach_w + 1));
  }
  if (std::max({reach_h, reach_w, shape.pad_h, shape.pad_w}) > kFarthest) {
    throw std::invalid_argument("conv: kernel and padding may reach " + std::to_string(kFarthest) + " pixels");
  }
  if (geometry.in_block_h != shape.stride * geometry.out_block_h ||
      geometry.in_block_w != shape.stride * geometry.out_block_w || geometry.grid * geometry.out_block_h < out_h ||
      geometry.grid * geometry.out_block_w < out_w) {
    throw std::invalid_argument(
        "conv: input blocks must be stride times output blocks, and those must hold the output");
  }
}

std::vector<Weight> Conv::Impl::ListWeights(const uint8_t* mask) {
  const int64_t group_in = shape.in_channels / shape.groups, group_out = shape.out_channels / shape.groups;
  const int64_t places = shape.kernel_h * shape.kernel_w, count = shape.out_channels * group_in * places;
  kept = mask ? std::count_if(mask, mask + count, [](uint8_t alive) { return alive != 0; }) : count;
  std::vector<Weight> placed;
  placed.reserve(kept);
  if (kept < count) weights.reserve(kept);
  for (int64_t filter = 0; filter < shape.out_channels * group_in; ++filter) {
    const int64_t out = filter / group_in, in = out / group_out * group_in + filter % group_in;
    for (int64_t place = 0; place < places; ++place) {
      if (mask && !mask[filter * places + place]) continue;
      placed.push_back({static_cast<int32_t>(out), static_cast<int32_t>(in), static_cast<int32_t>(place)});
      if (kept < count) weights.push_back(static_cast<int32_t>(filter * places + place));
    }
  }
  return placed;
}

void Conv::Impl::BuildForward(Pass* pass, const std::vector<Weight>& placed, bool needs_taps, bool dense) const {
  pass->rows = geometry.out_block_h;
  pass->cols = geometry.out_block_w;
  pass->in_step = shape.stride;
  pass->dense = dense;
  if (!needs_taps) return;
  std::vector<Reading> readings;  // of each place
  for (int64_t place = 0; place < shape.kernel_h * shape.kernel_w; ++place) {
    readings.push_back({static_cast<int32_t>(place),
                        static_cast<int16_t>(place / shape.kernel_w * shape.dilation - shape.pad_h),
                        static_cast<int16_t>(place % shape.kernel_w * shape.dilation - shape.pad_w)});
  }
  std::vector<std::vector<Tap>> taps(shape.out_channels);
  for (size_t i = 0; i < placed.size(); ++i) {
    const auto [out, in, place] = placed[i];
    taps[out].push_back({{in, readings[place].row, readings[place].col}, static_cast<int32_t>(i)});
  }
  pass->SetTaps(std::move(taps));
}

void Conv::Impl::AddGradientPass(const std::vector<Weight>& placed, int64_t phase_row, int64_t phase_col) {
  auto pass = std::make_unique<Pass>();
  pass->rows = geometry.out_block_h;
  pass->cols = geometry.out_block_w;
  pass->out_row = phase_row;
  pass->out_col = phase_col;
  pass->out_step = shape.stride;
  pass->dense = input_gradient == ConvKernel::kDense;
  pass->SetTaps(GradientTaps(shape, placed, GradientReadings(shape, phase_row, phase_col)));
  gradient_passes.push_back(std::move(pass));
}

void Conv::Impl::BuildInputGradient(const std::vector<Weight>& placed, bool dense_border) {
  const int64_t s = shape.stride;
  for (int64_t phase = 0; phase < s * s && input_gradient != ConvKernel::kWinograd; ++phase) {
    AddGradientPass(placed, phase / s, phase % s);
  }
  border = std::make_unique<Border>(shape, geometry, placed, dense_border);
  const int64_t reach = shape.dilation * (std::max(shape.kernel_h, shape.kernel_w) - 1);
  const int64_t before = CeilDiv(reach - std::min(shape.pad_h, shape.pad_w), s);
  const int64_t after = CeilDiv(std::max(shape.pad_h, shape.pad_w), s);
  gradient_halo = std::max<int64_t>(0, std::max(before, after));
}

// A map with the layer's sizes and no memory, for asking how much scratch it takes.
LaneMap Conv::Impl::Sketch(bool input) const {
  LaneMap map = {};
  map.batch = geometry.batch;
  map.channels = input ? shape.in_channels : shape.out_channels;
  map.height = input ? geometry.height : out_h;
  map.width = input ? geometry.width : out_w;
  map.block_h = input ? geometry.in_block_h : geometry.out_block_h;
  map.block_w = input ? geometry.in_block_w : geometry.out_block_w;
  map.grid = geometry.grid;
  return map;
}

int64_t Conv::Impl::ScratchFloats(int threads) const {
  const int64_t group = Kernels<TapKernels>().dense_group;
  const auto whole_groups = [group](int64_t channels) { return CeilDiv(channels, group) * group; };
  const int64_t dense =
      whole_groups(shape.out_channels) * whole_groups(shape.in_channels) * shape.kernel_h * shape.kernel_w;
  int64_t most = std::max({dense, kept, border->scratch_floats()});
  if (weight_gradient == ConvKernel::kSparse) {
    most = std::max(most, 16 * DotFloats(kept, shape.out_channels));  // see sparse_dot_chunks
  }
  if (weight_gradient == ConvKernel::kDense) {
    most = std::max(most, 8 * DotFloats(dense, whole_groups(shape.out_channels)));  // see dense_dot_chunks
  }
  const WinogradKernels& winograd = Winograd();
  const LaneMap x = Sketch(true), y = Sketch(false);
  const int64_t weight_floats = RoundUp(DenseWeightFloats());
  if (forward == ConvKernel::kWinograd) {
    const int64_t rest = std::max(weight_floats, winograd.forward_scratch(x, y, tile, threads));
    most = std::max(most, TransformedFloats() + rest);
  }
  if (input_gradient == ConvKernel::kWinograd) {
    const int64_t rest = std::max(weight_floats, winograd.input_gradient_scratch(y, x, tile, threads));
    most = std::max(most, TransformedFloats() + rest);
  }
  if (weight_gradient == ConvKernel::kWinograd) {
    most = std::max(most, weight_floats + winograd.weight_gradient_scratch(x, y, tile, threads));
  }
  return most + kVector;
}

// Packed values to w[out][in][kernel_h][kernel_w].
void Conv::Impl::Scatter(const float* values, float* dense, int threads) const {
  ForRanges(threads, DenseWeightFloats(), [&](int64_t i, int64_t last) { std::fill(dense + i, dense + last, 0.0f); });
  ForRanges(threads, kept, [&](int64_t i, int64_t last) {
    for (; i < last; ++i) dense[FlatIndex(i)] = values[i];
  });
}

// All frequencies of all filters.
void Conv::Impl::Transform(bool transposed, const float* values, float* transformed, float* scratch,
                           int threads) const {
  if (!dense()) {
    Scatter(values, scratch, threads);
    values = scratch;
  }
  // The packed order of a dense layer is w[out][in][kernel_h][kernel_w] itself.
  Winograd().transform_weights(values, shape.out_channels, shape.in_channels, transposed, tile, transformed, threads);
}

void Conv::Impl::AccumulateGradient(const Pass& pass, const float* values, const LaneMap& dy, const LaneMap& dx,
                                    float* scratch, int threads) const {
  Pack(pass, values, nullptr, dy, scratch, threads);
  Accumulate(pass, scratch, nullptr, dy, dx, {}, threads);
}

Conv::Conv(const ConvShape& shape, const ConvGeometry& geometry, const uint8_t* mask, ConvKernel asked, bool exact)
    : impl_(std::make_unique<Impl>()) {
  Impl& m = *impl_;
  m.shape = shape;
  m.geometry = geometry;
  m.CheckSizes();
  const std::vector<Weight> placed = m.ListWeights(mask);
  const auto choose = [&](ConvDirection direction, bool direct) {
    return ChooseKernel(asked, shape, geometry, m.kept, direction, direct);
  };
  m.forward = choose(ConvDirection::kForward, exact);
  m.input_gradient = choose(ConvDirection::kInputGradient, exact);
  m.weight_gradient = choose(ConvDirection::kWeightGradient, exact);
  m.tile = WinogradTile(geometry.out_block_h, geometry.out_block_w, shape.kernel_h, shape.stride);
  m.BuildForward(&m.forward_pass, placed, m.forward != ConvKernel::kWinograd, m.forward == ConvKernel::kDense);
  m.weight_pass.two_rows = kTwoRowsOfGradient;
  const bool alike = m.forward == ConvKernel::kDense || m.forward_pass.SameTiles(kTwoRowsOfGradient);
  m.shares_taps = m.forward == m.weight_gradient && m.forward != ConvKernel::kWinograd && alike;
  const bool dense = m.weight_gradient == ConvKernel::kDense;
  m.BuildForward(&m.weight_pass, placed, m.weight_gradient != ConvKernel::kWinograd && !m.shares_taps, dense);
  m.BuildInputGradient(placed, choose(ConvDirection::kInputGradient, true) == ConvKernel::kDense);
}

Conv::~Conv() = default;

int64_t Conv::kept() const { return impl_->kept; }
int64_t Conv::out_height() const { return impl_->out_h; }
int64_t Conv::out_width() const { return impl_->out_w; }
int64_t Conv::scratch_floats(int threads) const { return impl_->ScratchFloats(threads); }
int64_t Conv::gradient_halo() const { return impl_->gradient_halo; }
const char* Conv::forward_kernel() const { return Name(impl_->forward); }
const char* Conv::input_gradient_kernel() const { return Name(impl_->input_gradient); }
const char* Conv::weight_gradient_kernel() const { return Name(impl_->weight_gradient); }

int64_t Conv::prepared_floats() const {
  return impl_->forward == ConvKernel::kWinograd ? impl_->TransformedFloats() : PackedFloats(impl_->forward_pass);
}

void Conv::Prepare(const float* values, const LaneMap& x, float* prepared, float* scratch, int threads,
                   const ConvEnd& end) const {
  if (impl_->forward == ConvKernel::kWinograd) {
    impl_->Transform(false, values, prepared, scratch, threads);
  } else {
    Pack(impl_->forward_pass, values, end.scale, x, prepared, threads);
  }
}

void Conv::ForwardPrepared(const float* prepared, const float* bias, const LaneMap& x, const LaneMap& y, float* scratch,
                           int threads, const ConvEnd& end) const {
  // The halo is written along with the pixels where that can be done.
  ConvEnd stored = end;
  stored.halo.fill = end.halo.fill && end.halo.padding == Padding::kZero && std::min(y.block_h, y.block_w) >= y.halo;
  if (impl_->forward == ConvKernel::kWinograd) {
    impl_->Winograd().forward(x, prepared, bias, y, stored, impl_->tile, scratch, threads);
  } else {
    Accumulate(impl_->forward_pass, prepared, bias, x, y, stored, threads);
  }
  if (end.halo.fill && !stored.halo.fill) Kernels<LaneKernels>().fill_halo(y, end.halo.padding, end.halo.pad, threads);
}

bool Conv::IsPair(const Conv& first, const Conv& second) {
  const ConvShape& s = second.impl_->shape;
  return first.impl_->forward != ConvKernel::kWinograd && second.impl_->forward == ConvKernel::kSparse &&
         s.groups == s.in_channels && s.out_channels == s.in_channels &&
         first.impl_->shape.out_channels == s.in_channels;
}

void Conv::RunPair(const PreparedConv& first, const PreparedConv& second, const LaneMap& x, const LaneMap& between,
                   const HaloSpec& halo, const LaneMap& y, const HaloSpec& y_halo, int threads) {
  const Pass &one = first.conv->impl_->forward_pass, &two = second.conv->impl_->forward_pass;
  const auto one_taps = one.Bind(x), two_taps = two.Bind(between);
  const std::vector<Region> in = one.Regions(x, between), out = two.Regions(between, y);
  const PairPart parts[] = {
      {&one_taps->sparse, one.dense ? &one_taps->dense : nullptr, first.weights, first.bias, first.act},
      {&two_taps->sparse, nullptr, second.weights, second.bias, second.act}};
  Kernels<PairKernels>().run(in.data(), out.data(), static_cast<int64_t>(in.size()), parts[0], parts[1], between, halo,
                             y, y_halo, threads);
}

void Conv::Forward(const float* values, const float* bias, const LaneMap& x, const LaneMap& y, float* scratch,
                   int threads, const ConvEnd& end) const {
  float* rest = scratch + RoundUp(prepared_floats());
  Prepare(values, x, scratch, rest, threads, end);
  ForwardPrepared(scratch, bias, x, y, rest, threads, end);
}

void Conv::InputGradient(const float* values, const LaneMap& dy, const LaneMap& dx, float* scratch, int threads) const {
  const Impl& m = *impl_;
  if (m.input_gradient == ConvKernel::kWinograd) {
    float* rest = scratch + m.TransformedFloats();
    m.Transform(true, values, scratch, rest, threads);
    m.Winograd().input_gradient(dy, scratch, nullptr, dx, {}, m.tile, rest, threads);
  }
  for (const auto& pass : m.gradient_passes) m.AccumulateGradient(*pass, values, dy, dx, scratch, threads);
  m.border->AddTo(values, dy, dx, scratch, threads);
}

void Conv::WeightGradient(const LaneMap& x, const LaneMap& dy, float* dvalues, float* dbias, float* scratch,
                          int threads) const {
  const Impl& m = *impl_;
  const TapKernels& kernels = Kernels<TapKernels>();
  const Pass& pass = m.shares_taps ? m.forward_pass : m.weight_pass;
  const std::vector<Region> regions = pass.Regions(x, dy);
  const int64_t count = static_cast<int64_t>(regions.size());
  if (m.weight_gradient == ConvKernel::kSparse) {
    kernels.sparse_dot(regions.data(), count, pass.Bind(x)->sparse, scratch, dvalues, dbias, threads);
    return;
  }
  if (m.weight_gradient == ConvKernel::kDense) {
    kernels.dense_dot(regions.data(), count, pass.Bind(x)->dense, scratch, dbias, threads);
    ForRanges(threads, pass.outputs() * pass.taps(), [&](int64_t i, int64_t last) {
      for (; i < last; ++i) {
        const int32_t to = pass.Index(i);  // -1 where pruned
        if (to >= 0) dvalues[to] = scratch[i];
      }
    });
    return;
  }
  if (dbias) kernels.channel_sums(regions.data(), count, m.shape.out_channels, dbias, threads);
  float* rest = m.dense() ? scratch : scratch + RoundUp(m.DenseWeightFloats());
  m.Winograd().weight_gradient(x, dy, m.dense() ? dvalues : scratch, m.tile, rest, threads);
  if (m.dense()) return;
  ForRanges(threads, m.kept, [&](int64_t i, int64_t last) {
    for (; i < last; ++i) dvalues[i] = scratch[m.FlatIndex(i)];
  });
}

}  // namespace lipfast
