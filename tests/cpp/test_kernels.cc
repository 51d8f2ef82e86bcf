// The kernels without Python, for sanitizers and valgrind:
// every instruction set, every kernel, awkward sizes, maps in memory of exactly
// their size, answers compared with plain loops in double. Prints a plain closing
// line and exits 1 when anything is wrong.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "cpu/isa.h"
#include "support.h"

namespace lipfast {
namespace {

struct Case {
  int64_t batch, in, out, height, width, kernel, stride, pad;
  Padding padding;
  double density;
  int64_t grid = kGrid;
};

// Where padding takes pixel `at` from; -1 is zero.
int64_t Source(int64_t at, int64_t side, Padding mode) {
  if (at >= 0 && at < side) return at;
  switch (mode) {
    case Padding::kReflect:
      return at < 0 ? -at : 2 * (side - 1) - at;
    case Padding::kReplicate:
      return at < 0 ? 0 : side - 1;
    case Padding::kCircular:
      return (at + side) % side;
    default:
      return -1;
  }
}

void RunCase(const Case& c, ConvKernel kernel, int threads, const std::string& name) {
  std::mt19937 random(7);
  const int64_t out_h = (c.height + 2 * c.pad - c.kernel) / c.stride + 1;
  const int64_t out_w = (c.width + 2 * c.pad - c.kernel) / c.stride + 1;
  const auto block = [&](int64_t side, int64_t out_side) {
    const int64_t covered = c.grid * c.stride;
    return std::max((out_side + c.grid - 1) / c.grid, (side + covered - 1) / covered);
  };
  const int64_t block_h = block(c.height, out_h), block_w = block(c.width, out_w);
  const int64_t weight_count = c.out * c.in * c.kernel * c.kernel;
  std::vector<uint8_t> mask(weight_count);
  std::uniform_real_distribution<double> uniform;
  Tensor weight = Draw(weight_count, random), packed;
  for (int64_t i = 0; i < weight_count; ++i) {
    mask[i] = uniform(random) < c.density;
    if (mask[i]) {
      packed.push_back(weight[i]);
    } else {
      weight[i] = 0.0f;
    }
  }
  Tensor x = Draw(c.batch * c.in * c.height * c.width, random), bias = Draw(c.out, random);
  Tensor dy = Draw(c.batch * c.out * out_h * out_w, random);
  std::vector<double> y_want(dy.size()), dx_want(x.size()), dw_want(weight_count);
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t o = 0; o < c.out; ++o) {
      for (int64_t r = 0; r < out_h; ++r) {
        for (int64_t q = 0; q < out_w; ++q) {
          const int64_t at = ((n * c.out + o) * out_h + r) * out_w + q;
          y_want[at] = bias[o];
          for (int64_t i = 0; i < c.in; ++i) {
            for (int64_t k = 0; k < c.kernel * c.kernel; ++k) {
              const int64_t row = Source(r * c.stride + k / c.kernel - c.pad, c.height, c.padding);
              const int64_t col = Source(q * c.stride + k % c.kernel - c.pad, c.width, c.padding);
              if (row < 0 || col < 0) continue;
              const int64_t from = ((n * c.in + i) * c.height + row) * c.width + col;
              const int64_t w = (o * c.in + i) * c.kernel * c.kernel + k;
              y_want[at] += static_cast<double>(weight[w]) * x[from];
              dx_want[from] += static_cast<double>(weight[w]) * dy[at];
              dw_want[w] += static_cast<double>(x[from]) * dy[at];
            }
          }
        }
      }
    }
  }
  const ConvShape shape = {c.out, c.in, 1, c.kernel, c.kernel, c.stride, 1, c.pad, c.pad, c.padding};
  const ConvGeometry geometry = {Sheets(c.batch, c.grid), c.height, c.width, c.stride * block_h,
                                 c.stride * block_w,      block_h,  block_w, c.grid};
  const Conv conv(shape, geometry, mask.data(), kernel, false);
  const int64_t in_halo = std::max(c.pad, c.kernel - 1 - c.pad);
  Map xs(c.batch, c.in, c.height, c.width, c.stride * block_h, c.stride * block_w, in_halo, c.grid);
  Map dxs(c.batch, c.in, c.height, c.width, c.stride * block_h, c.stride * block_w, in_halo, c.grid);
  Map ys(c.batch, c.out, out_h, out_w, block_h, block_w, 0, c.grid);
  Map dys(c.batch, c.out, out_h, out_w, block_h, block_w, conv.gradient_halo(), c.grid);
  const LaneKernels& lanes = Kernels<LaneKernels>();
  Floats scratch(conv.scratch_floats(threads));
  lanes.from_plain(Plain(x, c.batch, c.in, c.height, c.width), xs.lanes, threads);
  lanes.fill_halo(xs.lanes, c.padding, c.pad, threads);
  lanes.from_plain(Plain(dy, c.batch, c.out, out_h, out_w), dys.lanes, threads);
  lanes.fill_halo(dys.lanes, Padding::kZero, 0, threads);
  Tensor y(dy.size()), dx(x.size()), dvalues(packed.size()), dbias(c.out);
  conv.Forward(packed.data(), bias.data(), xs.lanes, ys.lanes, scratch.data, threads);
  lanes.to_plain(ys.lanes, Plain(y, c.batch, c.out, out_h, out_w), threads);
  for (const ActivationSpec& end : {ActivationSpec{Activation::kRelu, 0.0f}, {Activation::kLeaky, 0.25f}}) {
    Tensor ended(y.size());
    conv.Forward(packed.data(), bias.data(), xs.lanes, ys.lanes, scratch.data, threads, {end});
    lanes.to_plain(ys.lanes, Plain(ended, c.batch, c.out, out_h, out_w), threads);
    bool same = true;
    for (size_t i = 0; i < y.size(); ++i) same = same && ended[i] == (y[i] > 0 ? y[i] : y[i] * end.slope);
    Expect(same, name + " forward that ends in an activation");
  }
  // The whole end: BatchNorm's scale, a residual (any map of the output's shape will do) and an activation.
  Tensor scale(c.out), finished(y.size());
  std::vector<double> finished_want(y.size());
  for (int64_t o = 0; o < c.out; ++o) scale[o] = 0.5f - 0.25f * static_cast<float>(o % 5);
  for (size_t i = 0; i < y.size(); ++i) {
    const size_t o = i / (out_h * out_w) % c.out;
    const double sum = scale[o] * (y_want[i] - bias[o]) + bias[o] + dy[i];
    finished_want[i] = sum > 0 ? sum : 0.25 * sum;
  }
  const ConvEnd whole = {{Activation::kLeaky, 0.25f}, scale.data(), &dys.lanes};
  conv.Forward(packed.data(), bias.data(), xs.lanes, ys.lanes, scratch.data, threads, whole);
  lanes.to_plain(ys.lanes, Plain(finished, c.batch, c.out, out_h, out_w), threads);
  Expect(Error(finished, finished_want) < 1e-5, name + " forward with scale, residual and activation");
  // Halos of two widths, one of them wider than most blocks; to the last bit what a pass of its own fills in.
  for (int64_t halo : {1, 3}) {
    for (const HaloSpec& spec : {HaloSpec{true, Padding::kZero, 0}, {true, Padding::kReplicate, 1}}) {
      Map along(c.batch, c.out, out_h, out_w, block_h, block_w, halo, c.grid);
      Map behind(c.batch, c.out, out_h, out_w, block_h, block_w, halo, c.grid);
      std::fill(along.floats.data, along.floats.data + along.floats.size, 7.0f);
      conv.Forward(packed.data(), bias.data(), xs.lanes, along.lanes, scratch.data, threads,
                   {{}, nullptr, nullptr, spec});
      conv.Forward(packed.data(), bias.data(), xs.lanes, behind.lanes, scratch.data, threads);
      lanes.fill_halo(behind.lanes, spec.padding, spec.pad, threads);
      const size_t bytes = along.floats.size * sizeof(float);
      Expect(std::memcmp(along.floats.data, behind.floats.data, bytes) == 0, name + " forward with its halo");
    }
  }
  conv.InputGradient(packed.data(), dys.lanes, dxs.lanes, scratch.data, threads);
  conv.WeightGradient(xs.lanes, dys.lanes, dvalues.data(), dbias.data(), scratch.data, threads);
  lanes.to_plain(dxs.lanes, Plain(dx, c.batch, c.in, c.height, c.width), threads);
  std::vector<double> dvalues_want;
  for (int64_t i = 0; i < weight_count; ++i) {
    if (mask[i]) dvalues_want.push_back(dw_want[i]);
  }
  Expect(Error(y, y_want) < 1e-5, name + " forward");
  Expect(Error(dx, dx_want) < 1e-5, name + " input gradient");
  Expect(Error(dvalues, dvalues_want) < 1e-5, name + " weight gradient");
}

// A 1x1 convolution and the depthwise one of a case behind it, to the last bit as one after the other.
void RunPairCase(const Case& c, ConvKernel kernel, ActivationSpec act, int threads, const std::string& name) {
  std::mt19937 random(11);
  const int64_t out_h = (c.height + 2 * c.pad - c.kernel) / c.stride + 1;
  const int64_t out_w = (c.width + 2 * c.pad - c.kernel) / c.stride + 1;
  const auto block = [&](int64_t side) { return (side + c.grid * c.stride - 1) / (c.grid * c.stride); };
  const int64_t block_h = block(c.height), block_w = block(c.width), sheets = Sheets(c.batch, c.grid);
  const int64_t in_h = c.stride * block_h, in_w = c.stride * block_w;
  const Conv one({c.out, c.in, 1, 1, 1, 1, 1, 0, 0, c.padding},
                 {sheets, c.height, c.width, in_h, in_w, in_h, in_w, c.grid}, nullptr, kernel, false);
  const Conv two({c.out, c.out, c.out, c.kernel, c.kernel, c.stride, 1, c.pad, c.pad, c.padding},
                 {sheets, c.height, c.width, in_h, in_w, block_h, block_w, c.grid}, nullptr, ConvKernel::kSparse,
                 false);
  Expect(Conv::IsPair(one, two) && !Conv::IsPair(two, one), name + " is a pair");
  const int64_t halo = std::max(c.pad, c.kernel - 1 - c.pad);
  Map xs(c.batch, c.in, c.height, c.width, in_h, in_w, 0, c.grid);
  Map between(c.batch, c.out, c.height, c.width, in_h, in_w, halo, c.grid);
  Map want(c.batch, c.out, out_h, out_w, block_h, block_w, 1, c.grid);
  Map got(c.batch, c.out, out_h, out_w, block_h, block_w, 1, c.grid);
  Tensor x = Draw(c.batch * c.in * c.height * c.width, random), bias = Draw(c.out, random);
  Tensor first = Draw(c.out * c.in, random), second = Draw(c.out * c.kernel * c.kernel, random);
  const LaneKernels& lanes = Kernels<LaneKernels>();
  lanes.from_plain(Plain(x, c.batch, c.in, c.height, c.width), xs.lanes, threads);
  Floats scratch(std::max(one.scratch_floats(threads), two.scratch_floats(threads)));
  const auto run = [&](const Conv& conv, const Tensor& values, const LaneMap& from, const LaneMap& to) {
    conv.Forward(values.data(), bias.data(), from, to, scratch.data, threads);
    Kernels<PointwiseKernels>().activate(to, to, act, threads);
  };
  run(one, first, xs.lanes, between.lanes);
  lanes.fill_halo(between.lanes, c.padding, c.pad, threads);
  run(two, second, between.lanes, want.lanes);
  lanes.fill_halo(want.lanes, Padding::kReplicate, 1, threads);
  LaneMap no_memory = between.lanes;
  no_memory.data = nullptr;
  Floats one_weights(one.prepared_floats()), two_weights(two.prepared_floats());
  one.Prepare(first.data(), xs.lanes, one_weights.data, scratch.data, threads);
  two.Prepare(second.data(), no_memory, two_weights.data, scratch.data, threads);
  Conv::RunPair({&one, one_weights.data, bias.data(), act}, {&two, two_weights.data, bias.data(), act}, xs.lanes,
                no_memory, {true, c.padding, c.pad}, got.lanes, {true, Padding::kReplicate, 1}, threads);
  const size_t bytes = want.floats.size * sizeof(float);
  Expect(std::memcmp(want.floats.data, got.floats.data, bytes) == 0, name + " as one after the other");
}

constexpr Case kPairs[] = {
    {1, 5, 20, 9, 13, 3, 1, 1, Padding::kZero, 1.0},        {2, 3, 40, 7, 7, 5, 1, 2, Padding::kReflect, 1.0},
    {1, 4, 9, 16, 17, 3, 2, 1, Padding::kCircular, 1.0},    {8, 3, 17, 6, 9, 3, 2, 1, Padding::kZero, 1.0, 2},
    {19, 2, 3, 5, 4, 3, 1, 1, Padding::kReplicate, 1.0, 1},
};

constexpr Case kCases[] = {
    {1, 5, 7, 9, 13, 3, 1, 1, Padding::kReflect, 0.3},      {2, 3, 4, 16, 16, 3, 1, 1, Padding::kZero, 1.0},
    {1, 4, 6, 16, 17, 3, 2, 1, Padding::kReflect, 0.5},     {1, 9, 5, 8, 20, 1, 1, 0, Padding::kZero, 0.4},
    {1, 2, 3, 1, 1, 3, 1, 1, Padding::kReplicate, 1.0},     {1, 3, 5, 12, 33, 5, 1, 2, Padding::kCircular, 0.2},
    {1, 3, 2, 7, 6, 2, 2, 0, Padding::kZero, 0.0},          {3, 2, 9, 33, 5, 3, 3, 1, Padding::kReplicate, 0.7},
    {4, 3, 5, 7, 6, 3, 1, 1, Padding::kZero, 0.5, 2},       {16, 5, 3, 5, 4, 3, 1, 1, Padding::kZero, 0.4, 1},
    {8, 2, 4, 9, 8, 3, 2, 1, Padding::kZero, 1.0, 2},       {32, 3, 2, 6, 7, 3, 2, 1, Padding::kZero, 0.6, 1},
    {16, 4, 6, 1, 1, 1, 1, 0, Padding::kZero, 0.5, 1},      {16, 2, 3, 8, 5, 5, 1, 0, Padding::kZero, 0.3, 1},
    {8, 3, 2, 7, 6, 3, 1, 1, Padding::kReflect, 0.5, 2},    {16, 2, 3, 6, 5, 5, 2, 2, Padding::kCircular, 0.6, 1},
    {16, 2, 2, 5, 7, 3, 1, 1, Padding::kReplicate, 1.0, 1}, {7, 3, 5, 7, 6, 3, 1, 1, Padding::kZero, 0.5, 2},
    {19, 3, 2, 6, 5, 3, 2, 1, Padding::kReflect, 0.6, 1},   {2, 4, 6, 9, 8, 3, 1, 1, Padding::kZero, 1.0, 2},
};

}  // namespace
}  // namespace lipfast

int main() {
  using namespace lipfast;
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kPlain}) {
    const char* only = std::getenv("LIPFAST_ISA");
    if (!IsaAvailable(isa) || (only && std::string(only) != IsaName(isa))) continue;
    SetIsa(isa);
    for (ConvKernel kernel : {ConvKernel::kSparse, ConvKernel::kWinograd, ConvKernel::kDense, ConvKernel::kAuto}) {
      for (size_t i = 0; i < std::size(kCases); ++i) {
        RunCase(kCases[i], kernel, 2,
                std::string(IsaName(isa)) + " kernel " + std::to_string(static_cast<int>(kernel)) + " case " +
                    std::to_string(i));
      }
    }
    for (size_t i = 0; i < std::size(kPairs); ++i) {
      const std::string name = std::string(IsaName(isa)) + " pair " + std::to_string(i);
      RunPairCase(kPairs[i], ConvKernel::kSparse, {Activation::kRelu6, 0.0f}, 2, name);
      RunPairCase(kPairs[i], ConvKernel::kDense, {Activation::kSilu, 0.0f}, 2, name + " dense");
    }
    RunPasses(2, IsaName(isa));
  }
  RunPace();
  RunPool();
  RunArenas();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0 || passed == 0;
}
