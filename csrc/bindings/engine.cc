#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "engine/fingerprint.h"
#include "engine/program.h"

namespace lipfast {
namespace {

constexpr int kVector = kGrid * kGrid;

std::string SizeOf(const LaneMap& m) {
  return "(" + std::to_string(m.pictures()) + ", " + std::to_string(m.channels) + ", " + std::to_string(m.height) +
         ", " + std::to_string(m.width) + ") in " + std::to_string(m.grid * m.grid) + " blocks of " +
         std::to_string(m.block_h) + " x " + std::to_string(m.block_w) + " with halo " + std::to_string(m.halo);
}

bool SameSheets(const LaneMap& a, const LaneMap& b) { return a.pictures() == b.pictures() && a.grid == b.grid; }

bool SameSize(const LaneMap& a, const LaneMap& b) {
  return SameSheets(a, b) && a.channels == b.channels && a.height == b.height && a.width == b.width;
}

bool SameBlocks(const LaneMap& a, const LaneMap& b) { return a.block_h == b.block_h && a.block_w == b.block_w; }

ActivationSpec AsActivation(int kind, float slope) {
  constexpr int kLast = static_cast<int>(kLastActivation);
  Check(kind >= 0 && kind <= kLast,
        "activation " + std::to_string(kind) + " is not one of 0 .. " + std::to_string(kLast));
  return {static_cast<Activation>(kind), slope};
}

using Indices = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// A Program whose every step is checked when it is added, so that running it cannot
// read or write outside its maps.
class CheckedProgram {
 public:
  explicit CheckedProgram(bool keeps_weights) : program_(keeps_weights) {}

  void Allocate(int64_t map_floats, int64_t value_count, int64_t statistic_count) {
    constexpr int64_t kMost = int64_t{1} << 40;
    for (int64_t count : {map_floats, value_count, statistic_count}) {
      Check(count >= 0 && count < kMost, "program: a size that is negative or above 2^40");
    }
    Check(program_.map_count() == 0, "program: memory is allocated once, before maps and steps");
    program_.Allocate(map_floats, value_count, statistic_count);
  }

  int AddMap(int64_t offset, const std::vector<int64_t>& shape, int64_t grid, int64_t block_h, int64_t block_w,
             int64_t halo, int64_t plane) {
    const LaneMap m = AsMap(shape, grid, block_h, block_w, halo, plane);
    Check(offset >= 0 && offset % kVector == 0 && m.batch * m.batch_stride <= program_.map_floats() - offset,
          "map: " + SizeOf(m) + " at " + std::to_string(offset) + " leaves the arena");
    return program_.AddMap(m, offset);
  }

  int AddChannels(int whole, int64_t first, int64_t last, int64_t step) {
    const LaneMap& m = Map(whole);
    Check(first >= 0 && first < last && last <= m.channels && step >= 1,
          "map: channels " + std::to_string(first) + " .. " + std::to_string(last) + " of " + SizeOf(m));
    return program_.AddChannels(whole, first, last, step);
  }

  int AddConv(const std::vector<int64_t>& s, const std::vector<int64_t>& g, int padding, const py::object& mask,
              int kernel, bool exact) {
    Check(s.size() == 9 && g.size() == 8, "conv: a shape has 9 numbers and a geometry 8");
    Check(padding >= 0 && padding <= 3 && kernel >= 0 && kernel <= 3, "conv: unknown padding or kernel");
    const ConvShape shape = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], static_cast<Padding>(padding)};
    const ConvGeometry geometry = {Sheets(g[0], g[7]), g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
    for (int i = 0; i < 7; ++i) Check(s[i] >= 1 && s[i] < (1 << 24) && g[i] >= 1, "conv: a size below 1");
    Check(shape.in_channels % shape.groups == 0 && shape.out_channels % shape.groups == 0,
          "conv: groups must divide the channels");
    Check(shape.pad_h >= 0 && shape.pad_w >= 0, "conv: negative padding");
    Check(geometry.in_block_h == shape.stride * geometry.out_block_h &&
              geometry.in_block_w == shape.stride * geometry.out_block_w,
          "conv: input blocks must be stride times the output's");
    const uint8_t* bytes = nullptr;
    if (!mask.is_none()) {
      const int64_t count = shape.out_channels * (shape.in_channels / shape.groups) * shape.kernel_h * shape.kernel_w;
      bytes = Flat<uint8_t>(mask.cast<py::array>(), count, "mask");
      if (std::any_of(bytes, bytes + count, [](uint8_t byte) { return byte > 1; })) {
        Refuse("mask: expected bytes 0 or 1");
      }
    }
    return program_.AddConv(shape, geometry, bytes, static_cast<ConvKernel>(kernel), exact);
  }

  void FromPlain(int where, int plain, int map) {
    Map(map);
    Check(plain >= 0 && plain < 1024, "from_plain: input index");
    program_.FromPlain(AsSection(where), plain, map);
  }

  void ToPlain(int where, int map, int plain) {
    Map(map);
    Check(plain >= 0 && plain < 1024, "to_plain: output index");
    program_.ToPlain(AsSection(where), map, plain);
  }

  void Clear(int where, int map) {
    Map(map);
    program_.Clear(AsSection(where), map);
  }

  void FillHalo(int where, int map, int mode, int64_t pad) {
    const Padding padding = AsPadding(mode, pad, Map(map));
    program_.FillHalo(AsSection(where), map, padding, pad);
  }

  void Reblock(int where, int from, int to) {
    Check(SameSize(Map(from), Map(to)), "reblock: the maps differ in size");
    program_.Reblock(AsSection(where), from, to);
  }

  void Flatten(int where, int map, int rows, bool to_map) {
    const LaneMap &m = Map(map), &r = Map(rows);
    Check(r.batch == 1 && r.channels == m.channels * m.height * m.width && r.height * r.width == m.pictures(),
          "flatten: the second map does not hold the first one's items as pixels");
    program_.Flatten(AsSection(where), map, rows, to_map);
  }

  void ConvForward(int where, int conv, int64_t values, int64_t bias, int x, int y, bool fill, int mode, int64_t pad) {
    CheckConvReads(conv, values, bias, Map(x), Map(y));
    program_.ConvForward(AsSection(where), conv, values, bias, x, y, AsHalo(fill, mode, pad, Map(y)));
  }

  // conv, values, bias, epsilon, offsets, act, slope
  using Finished = std::tuple<int, int64_t, int64_t, float, std::vector<int64_t>, int, float>;

  void ConvFinish(const Finished& conv, int x, int residual, int y, bool fill, int mode, int64_t pad) {
    const Program::FinishedConv finished = AsFinishedConv(conv);
    CheckConvReads(finished.conv, finished.values, finished.bias, Map(x), Map(y));
    if (residual >= 0) CheckPair(residual, y);
    Check(IsSimple(finished.act.kind), "conv: this activation cannot follow in the same step");
    program_.ConvFinish(finished, x, residual, y, AsHalo(fill, mode, pad, Map(y)));
  }

  bool IsPair(int first, int second) const { return Conv::IsPair(AsConv(first), AsConv(second)); }

  void ConvPair(const Finished& first, const Finished& second, int x, int64_t halo, int64_t plane, bool between_fill,
                int between_mode, int64_t between_pad, int y, bool fill, int mode, int64_t pad) {
    const Program::FinishedConv one = AsFinishedConv(first), two = AsFinishedConv(second);
    Check(IsPair(one.conv, two.conv), "conv_pair: the second is not a depthwise convolution of what the first makes");
    const ConvGeometry& g = program_.geometry(two.conv);
    const std::vector<int64_t> shape = {Map(x).pictures(), program_.shape(one.conv).out_channels, g.height, g.width};
    const LaneMap between = AsMap(shape, g.grid, g.in_block_h, g.in_block_w, halo, plane);
    CheckConvReads(one.conv, one.values, one.bias, Map(x), between);
    CheckConvReads(two.conv, two.values, two.bias, between, Map(y));
    program_.ConvPair(one, two, x, between, AsHalo(between_fill, between_mode, between_pad, between), y,
                      AsHalo(fill, mode, pad, Map(y)));
  }

  void ConvInputGradient(int where, int conv, int64_t values, int dy, int dx) {
    CheckConv(conv, values, -1, Map(dx), Map(dy));
    Check(Map(dy).halo >= program_.conv(conv).gradient_halo(), "conv: a gradient's halo is too small");
    program_.ConvInputGradient(AsSection(where), conv, values, dy, dx);
  }

  void ConvWeightGradient(int conv, int64_t values, int64_t bias, int x, int dy) {
    CheckConvReads(conv, values, bias, Map(x), Map(dy));
    program_.ConvWeightGradient(conv, values, bias, x, dy);
  }

  void ChannelSums(int64_t bias, int dy) {
    CheckValues(bias, Map(dy).channels);
    program_.ChannelSums(bias, dy);
  }

  void NormForward(int x, int y, float epsilon, float momentum, int act, float slope,
                   const std::vector<int64_t>& offsets, bool training, bool recover, bool fill, int mode, int64_t pad) {
    const NormSpec spec = AsNorm(x, epsilon, momentum, act, slope);
    CheckPair(x, y);
    const NormOffsets at = AsOffsets(offsets, spec.channels, 2 * spec.channels);
    Check(training || at.running_mean >= 0, "norm: evaluation needs running statistics");
    Check(!training || Map(x).pixels() > 1, "norm: one value has no variance");
    const HaloSpec halo = AsHalo(fill, mode, pad, Map(y));
    if (recover) {
      CheckUndoable(spec);
      Check(Map(x).data == Map(y).data, "norm: what does not lie where its input was cannot stand for it");
    }
    program_.NormForward(x, y, spec, at, training, halo, recover);
  }

  void NormBackward(int x, int dy, int dy2, int dx, float epsilon, int act, float slope,
                    const std::vector<int64_t>& offsets, bool training, bool zero_halo, bool recover) {
    const NormSpec spec = AsNorm(x, epsilon, 0.0f, act, slope);
    CheckPair(x, dy);
    CheckPair(x, dx);
    if (dy2 >= 0) CheckPair(x, dy2);
    if (recover) CheckUndoable(spec);
    program_.NormBackward(x, dy, dy2, dx, spec, AsOffsets(offsets, spec.channels, 2 * spec.channels), training,
                          zero_halo, recover);
  }

  void GroupNorm(int x, int y, int64_t groups, float epsilon, int act, float slope, const std::vector<int64_t>& offsets,
                 bool fill, int mode, int64_t pad) {
    CheckPair(x, y);
    const GroupNormSpec spec = AsGroupNorm(x, groups, epsilon, act, slope);
    program_.GroupNorm(x, y, spec, AsGroupOffsets(offsets, x, groups), AsHalo(fill, mode, pad, Map(y)));
  }

  void GroupNormBackward(int x, int dy, int dx, int64_t groups, float epsilon, int act, float slope,
                         const std::vector<int64_t>& offsets) {
    CheckPair(x, dy);
    CheckPair(x, dx);
    const GroupNormSpec spec = AsGroupNorm(x, groups, epsilon, act, slope);
    program_.GroupNormBackward(x, dy, dx, spec, AsGroupOffsets(offsets, x, groups));
  }

  void LayerNorm(int x, int y, float epsilon, bool centred, int64_t gamma, int64_t beta) {
    CheckPair(x, y);
    program_.LayerNorm(x, y, epsilon, centred, AsOffsets({gamma, beta, -1, -1, -1}, Map(x).channels, 0));
  }

  void LayerNormBackward(int x, int dy, int dx, float epsilon, bool centred, int64_t gamma, int64_t beta,
                         bool accumulate) {
    CheckPair(x, dy);
    CheckPair(x, dx);
    Check(!accumulate || Map(dx).data != Map(dy).data, "layer norm: a gradient cannot be added to what it comes from");
    program_.LayerNormBackward(x, dy, dx, epsilon, centred, AsOffsets({gamma, beta, -1, -1, -1}, Map(x).channels, 0),
                               accumulate);
  }

  // sizes: problems, features of keys and of values, queries, keys. places: of query, key, value and result, (pixels,
  // channels) as in HeadPlaces. scales: of scores, and epsilon of AttentionSpec. factors: where they start (-1: none),
  // whether their gradient is wanted. biases: where each starts, its rows in all and of each problem, whether its
  // gradient is wanted.
  using Sizes = std::array<int64_t, 5>;
  using Scales = std::pair<float, float>;
  using Factors = std::pair<int64_t, bool>;
  using Places = std::array<std::pair<Indices, Indices>, 4>;
  using Bias = std::tuple<int64_t, int64_t, Indices, bool>;

  void Attention(int query, int key, int value, int seen, const Sizes& sizes, const Places& places,
                 const Scales& scales, bool safe, const Factors& factors, const std::vector<Bias>& biases) {
    program_.Attention(query, key, value, seen,
                       AsAttention({query, key, value, seen}, sizes, places, scales, safe, factors, biases));
  }

  void AttentionBackward(int query, int key, int value, int dy, int dquery, int dkey, int dvalue, const Sizes& sizes,
                         const Places& places, const Scales& scales, bool safe, const Factors& factors,
                         const std::vector<Bias>& biases) {
    const auto form = AsAttention({query, key, value, dy}, sizes, places, scales, safe, factors, biases);
    if (dquery >= 0) CheckPair(query, dquery);
    if (dkey >= 0) CheckPair(key, dkey);
    if (dvalue >= 0) CheckPair(value, dvalue);
    program_.AttentionBackward(query, key, value, dy, dquery, dkey, dvalue, form);
  }

  // sizes: problems, channels. firsts: of query, key, value and result.
  void ChannelAttention(int query, int key, int value, int seen, const std::array<int64_t, 2>& sizes,
                        const Indices& pictures, const std::array<Indices, 4>& firsts, const Scales& scales,
                        const Factors& factors) {
    program_.ChannelAttention(query, key, value, seen,
                              AsChannelAttention({query, key, value, seen}, sizes, pictures, firsts, scales, factors));
  }

  void ChannelAttentionBackward(int query, int key, int value, int dy, int dquery, int dkey, int dvalue,
                                const std::array<int64_t, 2>& sizes, const Indices& pictures,
                                const std::array<Indices, 4>& firsts, const Scales& scales, const Factors& factors) {
    const auto form = AsChannelAttention({query, key, value, dy}, sizes, pictures, firsts, scales, factors);
    if (dquery >= 0) CheckPair(query, dquery);
    if (dkey >= 0) CheckPair(key, dkey);
    if (dvalue >= 0) CheckPair(value, dvalue);
    program_.ChannelAttentionBackward(query, key, value, dy, dquery, dkey, dvalue, form);
  }

  void Finish(int where, int x, int residual, int factor, int y, float epsilon, const std::vector<int64_t>& offsets,
              int act, float slope, bool fill, int mode, int64_t pad) {
    CheckPair(x, y);
    if (residual >= 0) CheckPair(residual, y);
    if (factor >= 0) CheckPair(factor, y);
    const NormOffsets at = AsFinishOffsets(offsets, Map(y).channels);
    const HaloSpec halo = AsHalo(fill, mode, pad, Map(y));
    program_.Finish(AsSection(where), x, residual, factor, y, epsilon, at, AsActivation(act, slope), halo);
  }

  void Prelu(int x, int y, int64_t slopes, int64_t step) {
    CheckPair(x, y);
    CheckSteps(slopes, step, Map(x).channels);
    program_.Prelu(x, y, slopes, step);
  }

  void PreluBackward(int x, int dy, int dx, int64_t slopes, int64_t step, bool accumulate) {
    CheckPair(x, dy);
    if (dx >= 0) CheckPair(x, dx);
    CheckSteps(slopes, step, Map(x).channels);
    program_.PreluBackward(x, dy, dx, slopes, step, accumulate);
  }

  void Activate(int x, int y, int act, float slope) {
    CheckPair(x, y);
    program_.Activate(x, y, AsActivation(act, slope));
  }

  void ActivateBackward(int x, int dy, int dx, int act, float slope, bool accumulate) {
    CheckPair(x, dy);
    CheckPair(x, dx);
    program_.ActivateBackward(x, dy, dx, AsActivation(act, slope), accumulate);
  }

  void Combine(int where, int a, float a_scale, int b, float b_scale, float shift, int y) {
    CheckPair(a, y);
    if (b >= 0) CheckSpreads(a, b);
    program_.Combine(AsSection(where), a, a_scale, b, b_scale, shift, y);
  }

  void Multiply(int where, int a, int b, int y, bool accumulate) {
    CheckPair(a, y);
    CheckSpreads(a, b);
    program_.Multiply(AsSection(where), a, b, y, accumulate);
  }

  void DotPlanes(int a, int b, int y, bool accumulate) {
    if (b >= 0) CheckPair(a, b);
    CheckOnePixel(a, y);
    program_.DotPlanes(a, b, y, accumulate);
  }

  void Total(int64_t value, int a, int b) {
    if (b >= 0) CheckPair(a, b);
    CheckValues(value, 1);
    program_.Total(value, a, b);
  }

  void DotChannels(int where, int a, int b, float scale, int y, bool accumulate) {
    if (b >= 0) CheckPair(a, b);
    CheckOneChannel(a, y);
    program_.DotChannels(AsSection(where), a, b, scale, y, accumulate);
  }

  void LargestChannel(int x, int y) {
    CheckOneChannel(x, y);
    program_.LargestChannel(x, y);
  }

  void LargestChannelBackward(int x, int dy, int dx, bool shared, bool accumulate) {
    CheckPair(x, dx);
    CheckOneChannel(x, dy);
    program_.LargestChannelBackward(x, dy, dx, shared, accumulate);
  }

  void ResponseNorm(int x, int y, float epsilon) {
    CheckOnePixel(x, y);
    program_.ResponseNorm(x, y, epsilon);
  }

  void ResponseNormBackward(int x, int dy, int dx, float epsilon, bool accumulate) {
    CheckPair(x, dx);
    CheckOnePixel(x, dy);
    program_.ResponseNormBackward(x, dy, dx, epsilon, accumulate);
  }

  void PixelNorm(int x, int y, float epsilon) {
    CheckPair(x, y);
    program_.PixelNorm(x, y, epsilon);
  }

  void PixelNormBackward(int x, int dy, int dx, float epsilon, bool accumulate) {
    CheckPair(x, dy);
    CheckPair(x, dx);
    program_.PixelNormBackward(x, dy, dx, epsilon, accumulate);
  }

  void Upsample2(bool bilinear, int x, int y) {
    CheckEnlarged(x, y, 2, 1);
    Check(!bilinear || Map(x).halo >= 1, "upsample: bilinear needs a halo on its input");
    program_.Upsample2(bilinear, x, y);
  }

  void Upsample2Backward(bool bilinear, int dy, int dx, bool accumulate) {
    CheckEnlarged(dx, dy, 2, 1);
    Check(!bilinear || Map(dy).halo >= 1, "upsample: bilinear needs a halo on its gradient");
    program_.Upsample2Backward(bilinear, dy, dx, accumulate);
  }

  void Shuffle(int where, int many, int large, bool to_large, bool accumulate) {
    const int64_t r = Map(large).block_h / Map(many).block_h;
    CheckEnlarged(many, large, r, r * r);
    program_.Shuffle(AsSection(where), many, large, to_large, accumulate);
  }

  void Resample(int x, int y, const AxisTable& rows, const AxisTable& columns) {
    CheckTaps(Map(x), Map(y), rows, columns);
    program_.Resample(x, y, rows, columns);
  }

  void ResampleBackward(int dy, int dx, const AxisTable& rows, const AxisTable& columns) {
    CheckTaps(Map(dx), Map(dy), rows, columns);
    program_.ResampleBackward(dy, dx, rows, columns);
  }

  void Pool(int x, int y, int64_t kernel, int64_t stride, int64_t pad, int64_t counted, bool maximum, bool fill,
            int mode, int64_t halo_pad) {
    const PoolSpec spec = AsPool(x, y, kernel, stride, pad, counted, maximum);
    const int64_t behind = kernel - stride - pad;
    Check(Map(x).halo >= (pad > behind ? pad : behind), "pool: the input's halo is smaller than the window's reach");
    program_.Pool(x, y, spec, AsHalo(fill, mode, halo_pad, Map(y)));
  }

  void PoolBackward(int x, int dy, int dx, int64_t kernel, int64_t stride, int64_t pad, int64_t counted, bool maximum) {
    CheckPair(x, dx);
    program_.PoolBackward(x, dy, dx, AsPool(x, dy, kernel, stride, pad, counted, maximum));
  }

  void Mean(int x, int y) {
    CheckOnePixel(x, y);
    program_.Mean(x, y);
  }

  void MeanBackward(int dy, int dx) {
    CheckOnePixel(dx, dy);
    program_.MeanBackward(dy, dx);
  }

  void MeanTo(int x, int y) {
    CheckPlanes(x, y);
    program_.MeanTo(x, y);
  }

  void MeanToBackward(int dy, int dx) {
    CheckPlanes(dx, dy);
    program_.MeanToBackward(dy, dx);
  }

  // arrays[i] goes to `counts[i]` numbers from `starts[i]` on: of the values, and from array `values` on of the
  // statistics.
  void Load(const std::vector<py::array>& arrays, const std::vector<int64_t>& starts,
            const std::vector<int64_t>& counts, int64_t values, int threads) {
    Check(starts.size() == arrays.size() && counts.size() == arrays.size(), "load: a start and a count for each array");
    std::vector<Program::Source> sources;
    for (int64_t i = 0; i < static_cast<int64_t>(arrays.size()); ++i) {
      const int64_t all = i < values ? program_.value_count() : program_.statistic_count();
      if (starts[i] < 0 || counts[i] < 0 || counts[i] > all - starts[i]) Refuse("load: a place out of range");
      float* to = (i < values ? program_.values() : program_.statistics()) + starts[i];
      sources.push_back({Flat<float>(arrays[i], counts[i], "load"), to, counts[i]});
    }
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(running_);
    program_.Load(sources, threads);
  }

  void Run(int where, const std::vector<py::array>& tensors, int threads) {
    const Section section = AsSection(where);
    if (static_cast<int>(tensors.size()) != program_.plain_count(section)) {
      Refuse("run: expected " + std::to_string(program_.plain_count(section)) + " tensors, got " +
             std::to_string(tensors.size()));
    }
    std::vector<PlainMap> plains;
    for (int i = 0; i < static_cast<int>(tensors.size()); ++i) {
      const LaneMap& m = program_.plain_map(section, i);
      plains.push_back(tensors[i].ndim() == 2 ? AsPixels(tensors[i], m.height, m.width, "run")
                                              : AsPlainMap(tensors[i], "run"));
      const PlainMap& p = plains.back();
      if (p.batch != m.pictures() || p.channels != m.channels || p.height != m.height || p.width != m.width) {
        Refuse("run: tensor " + std::to_string(i) + " is " + Describe(tensors[i]) + ", planned for " + SizeOf(m));
      }
    }
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(running_);
    program_.Run(section, plains.data(), threads);
  }

  py::list Profile() const {
    py::list rows;
    for (const StepTime& time : program_.Profile()) {
      rows.append(py::make_tuple(time.section == Section::kForward ? "forward" : "backward", time.label, time.seconds));
    }
    return rows;
  }

  py::tuple ConvKernels(int conv) const {
    const Conv& c = AsConv(conv);
    return py::make_tuple(c.forward_kernel(), c.input_gradient_kernel(), c.weight_gradient_kernel());
  }

  int64_t GradientHalo(int conv) const { return AsConv(conv).gradient_halo(); }

  Program& program() { return program_; }

 private:
  static Section AsSection(int where) {
    Check(where == 0 || where == 1, "section is 0 (forward) or 1 (backward)");
    return static_cast<Section>(where);
  }

  // A map without memory.
  static LaneMap AsMap(const std::vector<int64_t>& shape, int64_t grid, int64_t block_h, int64_t block_w, int64_t halo,
                       int64_t plane) {
    Check(shape.size() == 4, "map: a shape has 4 sides");
    const int64_t sheets = Sheets(shape[0], grid);
    for (int64_t side : shape) Check(side >= 1 && side < (int64_t{1} << 31), "map: a side below 1 or above 2^31");
    Check(block_h >= 1 && block_w >= 1 && halo >= 0 && block_h < (1 << 24) && block_w < (1 << 24) && halo < (1 << 16) &&
              grid * block_h >= shape[2] && grid * block_w >= shape[3],
          "map: blocks too small for the picture");
    LaneMap m = {};
    m.grid = grid, m.missing = sheets * SheetOn(grid) - shape[0];
    m.batch = sheets, m.channels = shape[1], m.height = shape[2], m.width = shape[3];
    m.block_h = block_h, m.block_w = block_w, m.halo = halo;
    m.row_stride = (block_w + 2 * halo) * kVector;
    Check(plane >= (block_h + 2 * halo) * (block_w + 2 * halo) && plane < (int64_t{1} << 40),
          "map: planes of " + std::to_string(plane) + " vectors overlap");
    m.channel_stride = plane * kVector;
    m.batch_stride = m.channels * m.channel_stride;
    return m;
  }

  const LaneMap& Map(int index) const {
    Check(index >= 0 && index < program_.map_count(), "unknown map " + std::to_string(index));
    return program_.map(index);
  }

  // Of so many pictures.
  static int64_t Sheets(int64_t pictures, int64_t grid) {
    Check(grid == 1 || grid == 2 || grid == 4, "a grid of " + std::to_string(grid) + " is not 1, 2 or 4");
    return (pictures + SheetOn(grid) - 1) / SheetOn(grid);
  }

  void CheckPair(int a, int b) const {
    Check(SameSize(Map(a), Map(b)) && SameBlocks(Map(a), Map(b)),
          "maps differ: " + SizeOf(Map(a)) + " and " + SizeOf(Map(b)));
  }

  // b is as a, or of one channel, or holds one number for each plane of it.
  void CheckSpreads(int a, int b) const {
    if (Map(b).channels != Map(a).channels) {
      CheckOneChannel(a, b);
    } else if (SameSize(Map(a), Map(b))) {
      CheckPair(a, b);
    } else {
      CheckOnePixel(a, b);
    }
  }

  // y holds one number for each pixel of x.
  void CheckOneChannel(int x, int y) const {
    const LaneMap &m = Map(x), &one = Map(y);
    Check(
        SameSheets(m, one) && one.channels == 1 && m.height == one.height && m.width == one.width && SameBlocks(m, one),
        SizeOf(one) + " is not one channel for all of " + SizeOf(m));
  }

  // x and y have as many planes.
  void CheckPlanes(int x, int y) const {
    Check(SameSheets(Map(x), Map(y)) && Map(x).channels == Map(y).channels,
          "maps differ in planes: " + SizeOf(Map(x)) + " and " + SizeOf(Map(y)));
  }

  // y holds one number for each plane of x.
  void CheckOnePixel(int x, int y) const {
    Check(SameSheets(Map(x), Map(y)) && Map(x).channels == Map(y).channels && Map(y).height == 1 && Map(y).width == 1,
          SizeOf(Map(y)) + " is not one pixel for each plane of " + SizeOf(Map(x)));
  }

  // Sides and blocks of y are r times those of x. channels: of x, for each of y
  void CheckEnlarged(int x, int y, int64_t r, int64_t channels) const {
    const LaneMap &small = Map(x), &large = Map(y);
    Check(r >= 1 && SameSheets(small, large) && small.channels == channels * large.channels &&
              r * small.height == large.height && r * small.width == large.width &&
              r * small.block_h == large.block_h && r * small.block_w == large.block_w,
          SizeOf(large) + " is not " + std::to_string(r) + " times " + SizeOf(small));
  }

  const Conv& AsConv(int conv) const {
    Check(conv >= 0 && conv < program_.conv_count(), "conv: unknown index " + std::to_string(conv));
    return program_.conv(conv);
  }

  Program::FinishedConv AsFinishedConv(const Finished& f) const {
    const auto& [conv, values, bias, epsilon, offsets, act, slope] = f;
    AsConv(conv);
    const NormOffsets at = AsFinishOffsets(offsets, program_.shape(conv).out_channels);
    return {conv, values, bias, epsilon, at, AsActivation(act, slope)};
  }

  int64_t Reach(int conv) const {
    const ConvShape& s = program_.shape(conv);
    const int64_t behind_h = s.dilation * (s.kernel_h - 1) - s.pad_h - (s.stride - 1);
    const int64_t behind_w = s.dilation * (s.kernel_w - 1) - s.pad_w - (s.stride - 1);
    return std::max(std::max(s.pad_h, s.pad_w), std::max(behind_h, behind_w));
  }

  void CheckValues(int64_t offset, int64_t count) const {
    Check(offset >= 0 && count <= program_.value_count() - offset, "parameter offset out of range");
  }

  // Numbers of channels that lie `step` apart.
  void CheckSteps(int64_t offset, int64_t step, int64_t channels) const {
    Check(step == 0 || step == 1, "a step between the numbers of channels that is not 0 or 1");
    CheckValues(offset, step == 0 ? 1 : channels);
  }

  void CheckConv(int conv, int64_t values, int64_t bias, const LaneMap& in, const LaneMap& out) const {
    AsConv(conv);
    const ConvShape& s = program_.shape(conv);
    const ConvGeometry& g = program_.geometry(conv);
    Check(in.batch == g.batch && in.grid == g.grid && in.channels == s.in_channels && in.height == g.height &&
              in.width == g.width && in.block_h == g.in_block_h && in.block_w == g.in_block_w,
          "conv: its input was planned differently from " + SizeOf(in));
    Check(out.batch == g.batch && out.grid == g.grid && out.channels == s.out_channels &&
              out.height == program_.conv(conv).out_height() && out.width == program_.conv(conv).out_width() &&
              out.block_h == g.out_block_h && out.block_w == g.out_block_w,
          "conv: its output was planned differently from " + SizeOf(out));
    CheckValues(values, program_.conv(conv).kept());
    if (bias >= 0) CheckValues(bias, s.out_channels);
  }

  // The same for a step that reads the convolution's input.
  void CheckConvReads(int conv, int64_t values, int64_t bias, const LaneMap& x, const LaneMap& y) const {
    CheckConv(conv, values, bias, x, y);
    Check(x.halo >= Reach(conv), "conv: the input's halo is smaller than the padding");
  }

  static HaloSpec AsHalo(bool fill, int mode, int64_t pad, const LaneMap& map) {
    return {fill, fill ? AsPadding(mode, pad, map) : Padding::kZero, pad};
  }

  NormSpec AsNorm(int x, float epsilon, float momentum, int act, float slope) const {
    return {Map(x).channels, epsilon, momentum, AsActivation(act, slope), {nullptr, nullptr}};
  }

  GroupNormSpec AsGroupNorm(int x, int64_t groups, float epsilon, int act, float slope) const {
    Check(groups > 0 && Map(x).channels % groups == 0, "group norm: " + std::to_string(groups) +
                                                           " groups do not divide " + std::to_string(Map(x).channels) +
                                                           " channels");
    return {groups, epsilon, AsActivation(act, slope), {nullptr, nullptr}};
  }

  // Numbers of a list, each in [0, count).
  static std::vector<int32_t> AsIndices(const Indices& given, int64_t size, int64_t count, const char* what) {
    Check(given.ndim() == 1 && given.size() == size,
          std::string("attention: expected ") + std::to_string(size) + " " + what);
    std::vector<int32_t> found(given.data(), given.data() + size);
    for (const int32_t index : found) {
      Check(index >= 0 && index < count, std::string("attention: ") + what + " " + std::to_string(index) +
                                             " is not one of 0 .. " + std::to_string(count - 1));
    }
    return found;
  }

  Program::AttentionForm AsAttention(const std::array<int, 4>& maps, const Sizes& sizes, const Places& places,
                                     const Scales& scales, bool safe, const Factors& factors,
                                     const std::vector<Bias>& biases) const {
    const auto [problems, of_keys, of_values, queries, keys] = sizes;
    for (const int64_t size : sizes) Check(size > 0, "attention: a size is not positive");
    Program::AttentionForm form = {problems,      of_keys, of_values, queries, keys,          scales.first,
                                   scales.second, safe,    {},        {},      factors.first, factors.second};
    for (int i = 0; i < 4; ++i) {
      const LaneMap& m = Map(maps[i]);
      const int64_t features = i < 2 ? of_keys : of_values;
      const int64_t tokens = i == 1 || i == 2 ? keys : queries;
      form.places[i].pixels = AsIndices(places[i].first, problems * tokens, m.pixels(), "pixels");
      form.places[i].channels = AsIndices(places[i].second, problems, m.channels - features + 1, "channels");
    }
    if (form.factors >= 0) CheckValues(form.factors, problems);
    int trained = 0;
    for (const auto& [start, count, rows, wanted] : biases) {
      Check(count > 0, "attention: a bias without rows");
      CheckValues(start, count * keys * BiasWidth(queries));
      form.biases.push_back({start, count, wanted, AsIndices(rows, problems, count, "rows")});
      trained += wanted;
    }
    Check(trained <= 1, "attention: gradients of two biases");
    return form;
  }

  Program::ChannelAttentionForm AsChannelAttention(const std::array<int, 4>& maps, const std::array<int64_t, 2>& sizes,
                                                   const Indices& pictures, const std::array<Indices, 4>& firsts,
                                                   const Scales& scales, const Factors& factors) const {
    const auto [problems, channels] = sizes;
    Check(problems > 0 && channels > 0, "channel attention: a size is not positive");
    Program::ChannelAttentionForm form = {problems, channels, scales.first,  scales.second,
                                          {},       {},       factors.first, factors.second};
    const LaneMap& first = Map(maps[0]);
    Check(first.grid == kGrid, "channel attention: pictures that share lanes");
    form.pictures = AsIndices(pictures, problems, first.batch, "pictures");
    for (int i = 0; i < 4; ++i) {
      const LaneMap& m = Map(maps[i]);
      Check(m.batch == first.batch && m.height == first.height && m.width == first.width && SameBlocks(m, first),
            "channel attention: maps of different sizes");
      form.firsts[i] = AsIndices(firsts[i], problems, m.channels - channels + 1, "channels");
    }
    if (form.factors >= 0) CheckValues(form.factors, problems);
    return form;
  }

  static void CheckUndoable(const NormSpec& spec) {
    const Activation act = spec.act.kind;
    Check(act == Activation::kNone || (act == Activation::kLeaky && spec.act.slope > 0),
          "norm: this activation cannot be undone");
  }

  // gamma, beta, running mean, running variance, the start of `saved` floats (-1 where nothing is).
  NormOffsets AsOffsets(const std::vector<int64_t>& at, int64_t channels, int64_t saved) const {
    Check(at.size() == 5, "norm: expected 5 offsets");
    for (int i = 0; i < 2; ++i) {
      if (at[i] >= 0) CheckValues(at[i], channels);
    }
    for (int i = 2; i < 5; ++i) {
      const int64_t count = i == 4 ? saved : channels;
      Check(at[i] < 0 ? i < 4 || saved == 0 : count <= program_.statistic_count() - at[i],
            "norm: statistics offset out of range");
    }
    Check((at[2] < 0) == (at[3] < 0), "norm: one running statistic without the other");
    return {at[0], at[1], at[2], at[3], at[4]};
  }

  // gamma, beta, running mean, running variance, the steps from channel to channel of gamma and beta, a learned slope
  NormOffsets AsFinishOffsets(const std::vector<int64_t>& at, int64_t channels) const {
    Check(at.size() == 7, "finish: expected 4 offsets, 2 steps and the offset of a slope");
    NormOffsets offsets = AsOffsets({-1, -1, at[2], at[3], -1}, channels, 0);
    for (int i = 0; i < 2; ++i) {
      if (at[i] >= 0) CheckSteps(at[i], at[4 + i], channels);
    }
    offsets.gamma = at[0], offsets.beta = at[1];
    offsets.gamma_step = at[4], offsets.beta_step = at[5];
    offsets.slope = AsSlope(at[6]);
    return offsets;
  }

  // gamma, beta, saved, a learned slope
  NormOffsets AsGroupOffsets(const std::vector<int64_t>& at, int x, int64_t groups) const {
    Check(at.size() == 4, "group norm: expected 4 offsets");
    NormOffsets offsets =
        AsOffsets({at[0], at[1], -1, -1, at[2]}, Map(x).channels, 2 * Map(x).batch * groups * kVector);
    offsets.slope = AsSlope(at[3]);
    return offsets;
  }

  int64_t AsSlope(int64_t at) const {
    if (at >= 0) CheckValues(at, 1);
    return at;
  }

  static void CheckAxis(const AxisTable& axis, int64_t from, int64_t to) {
    const size_t n = axis.first.size();
    Check(static_cast<int64_t>(n) == to && axis.second.size() == axis.weight.size() &&
              (axis.weight.empty() || axis.weight.size() == n),
          "resample: a table's length is not the output's side");
    for (int32_t i : axis.first) Check(i >= -1 && i < from, "resample: an index leaves the picture");
    for (int32_t i : axis.second) Check(i >= 0 && i < from, "resample: an index leaves the picture");
  }

  static void CheckTaps(const LaneMap& x, const LaneMap& y, const AxisTable& rows, const AxisTable& columns) {
    Check(SameSheets(x, y) && x.channels == y.channels, "resample: the maps differ in channels");
    CheckAxis(rows, x.height, y.height);
    CheckAxis(columns, x.width, y.width);
  }

  // Of a window's steps along one axis: torch rounds their number down or, the last one starting in the picture, up.
  static bool AreWindows(int64_t windows, int64_t side, int64_t kernel, int64_t stride, int64_t pad) {
    const int64_t last = (windows - 1) * stride - pad, end = side + pad;
    return windows >= 1 && last < side && last + kernel < end + stride && last + stride + kernel > end;
  }

  PoolSpec AsPool(int x, int y, int64_t kernel, int64_t stride, int64_t pad, int64_t counted, bool maximum) const {
    const LaneMap &in = Map(x), &out = Map(y);
    Check(kernel >= 1 && kernel < (1 << 16) && stride >= 1 && stride < (1 << 16) && pad >= 0 && 2 * pad <= kernel &&
              (counted == 0 || counted == pad),
          "pool: kernel, stride or padding out of range");
    Check(SameSheets(in, out) && in.channels == out.channels && in.block_h == stride * out.block_h &&
              in.block_w == stride * out.block_w && AreWindows(out.height, in.height, kernel, stride, pad) &&
              AreWindows(out.width, in.width, kernel, stride, pad),
          "pool: " + SizeOf(out) + " does not follow from " + SizeOf(in));
    return {kernel, stride, pad, counted, maximum};
  }

  Program program_;
  std::mutex running_;
};

// A view of one of the program's vectors, which keeps the program alive.
py::array_t<float> View(py::object owner, float* data, int64_t count) {
  return py::array_t<float>({count}, {static_cast<py::ssize_t>(sizeof(float))}, data, std::move(owner));
}

// One mark of several arrays of bytes.
uint64_t FingerprintAll(const std::vector<py::array>& arrays, int threads) {
  std::vector<Bytes> parts;
  for (const py::array& array : arrays) {
    parts.push_back({Flat<uint8_t>(array, -1, "fingerprint"), static_cast<int64_t>(array.nbytes())});
  }
  py::gil_scoped_release release;
  return Fingerprint(parts, threads);
}

}  // namespace

void BindEngine(py::module_& m) {
  m.def("fingerprint", &FingerprintAll, py::arg("arrays"), py::arg("threads"),
        "A 64-bit mark of arrays of bytes that changes when any of them does.");
  py::class_<AxisTable>(m, "AxisTable", "Which input positions each output position of one axis takes.")
      .def(py::init([](std::vector<int32_t> first, std::vector<int32_t> second, std::vector<float> weight) {
             return AxisTable{std::move(first), std::move(second), std::move(weight)};
           }),
           py::arg("first"), py::arg("second"), py::arg("weight"));
  using P = CheckedProgram;
  py::class_<P>(m, "Program", "A network as two lists of steps over planned memory; see csrc/engine/program.h.")
      .def(py::init<bool>(), py::arg("keeps_weights"))
      .def("allocate", &P::Allocate, py::arg("map_floats"), py::arg("value_count"), py::arg("statistic_count"))
      .def("values",
           [](py::object self) {
             Program& p = self.cast<P&>().program();
             return View(self, p.values(), p.value_count());
           })
      .def("gradients",
           [](py::object self) {
             Program& p = self.cast<P&>().program();
             return View(self, p.gradients(), p.value_count());
           })
      .def("statistics",
           [](py::object self) {
             Program& p = self.cast<P&>().program();
             return View(self, p.statistics(), p.statistic_count());
           })
      .def("bytes", [](P& self) { return self.program().bytes(); })
      .def("add_map", &P::AddMap, py::arg("offset"), py::arg("shape"), py::arg("grid"), py::arg("block_h"),
           py::arg("block_w"), py::arg("halo"), py::arg("plane"))
      .def("add_channels", &P::AddChannels, py::arg("whole"), py::arg("first"), py::arg("last"), py::arg("step"))
      .def("add_conv", &P::AddConv, py::arg("shape"), py::arg("geometry"), py::arg("padding"), py::arg("mask"),
           py::arg("kernel"), py::arg("exact"))
      .def("conv_kernels", &P::ConvKernels, py::arg("conv"))
      .def("gradient_halo", &P::GradientHalo, py::arg("conv"))
      .def("from_plain", &P::FromPlain, py::arg("section"), py::arg("plain"), py::arg("map"))
      .def("to_plain", &P::ToPlain, py::arg("section"), py::arg("map"), py::arg("plain"))
      .def("clear", &P::Clear, py::arg("section"), py::arg("map"))
      .def("fill_halo", &P::FillHalo, py::arg("section"), py::arg("map"), py::arg("mode"), py::arg("pad"))
      .def("reblock", &P::Reblock, py::arg("section"), py::arg("source"), py::arg("to"))
      .def("flatten", &P::Flatten, py::arg("section"), py::arg("map"), py::arg("rows"), py::arg("to_map"))
      .def("conv_forward", &P::ConvForward, py::arg("section"), py::arg("conv"), py::arg("values"), py::arg("bias"),
           py::arg("x"), py::arg("y"), py::arg("fill"), py::arg("mode"), py::arg("pad"))
      .def("conv_finish", &P::ConvFinish, py::arg("conv"), py::arg("x"), py::arg("residual"), py::arg("y"),
           py::arg("fill"), py::arg("mode"), py::arg("pad"))
      .def("is_pair", &P::IsPair, py::arg("first"), py::arg("second"))
      .def("conv_pair", &P::ConvPair, py::arg("first"), py::arg("second"), py::arg("x"), py::arg("halo"),
           py::arg("plane"), py::arg("between_fill"), py::arg("between_mode"), py::arg("between_pad"), py::arg("y"),
           py::arg("fill"), py::arg("mode"), py::arg("pad"))
      .def("conv_input_gradient", &P::ConvInputGradient, py::arg("section"), py::arg("conv"), py::arg("values"),
           py::arg("dy"), py::arg("dx"))
      .def("conv_weight_gradient", &P::ConvWeightGradient, py::arg("conv"), py::arg("values"), py::arg("bias"),
           py::arg("x"), py::arg("dy"))
      .def("channel_sums", &P::ChannelSums, py::arg("bias"), py::arg("dy"))
      .def("norm_forward", &P::NormForward, py::arg("x"), py::arg("y"), py::arg("epsilon"), py::arg("momentum"),
           py::arg("act"), py::arg("slope"), py::arg("offsets"), py::arg("training"), py::arg("recover"),
           py::arg("fill"), py::arg("mode"), py::arg("pad"))
      .def("norm_backward", &P::NormBackward, py::arg("x"), py::arg("dy"), py::arg("dy2"), py::arg("dx"),
           py::arg("epsilon"), py::arg("act"), py::arg("slope"), py::arg("offsets"), py::arg("training"),
           py::arg("zero_halo"), py::arg("recover"))
      .def("group_norm", &P::GroupNorm, py::arg("x"), py::arg("y"), py::arg("groups"), py::arg("epsilon"),
           py::arg("act"), py::arg("slope"), py::arg("offsets"), py::arg("fill"), py::arg("mode"), py::arg("pad"))
      .def("group_norm_backward", &P::GroupNormBackward, py::arg("x"), py::arg("dy"), py::arg("dx"), py::arg("groups"),
           py::arg("epsilon"), py::arg("act"), py::arg("slope"), py::arg("offsets"))
      .def("finish", &P::Finish, py::arg("section"), py::arg("x"), py::arg("residual"), py::arg("factor"), py::arg("y"),
           py::arg("epsilon"), py::arg("offsets"), py::arg("act"), py::arg("slope"), py::arg("fill"), py::arg("mode"),
           py::arg("pad"))
      .def("prelu", &P::Prelu, py::arg("x"), py::arg("y"), py::arg("slopes"), py::arg("step"))
      .def("prelu_backward", &P::PreluBackward, py::arg("x"), py::arg("dy"), py::arg("dx"), py::arg("slopes"),
           py::arg("step"), py::arg("accumulate"))
      .def("activate", &P::Activate, py::arg("x"), py::arg("y"), py::arg("act"), py::arg("slope"))
      .def("activate_backward", &P::ActivateBackward, py::arg("x"), py::arg("dy"), py::arg("dx"), py::arg("act"),
           py::arg("slope"), py::arg("accumulate"))
      .def("combine", &P::Combine, py::arg("section"), py::arg("a"), py::arg("a_scale"), py::arg("b"),
           py::arg("b_scale"), py::arg("shift"), py::arg("y"))
      .def("multiply", &P::Multiply, py::arg("section"), py::arg("a"), py::arg("b"), py::arg("y"),
           py::arg("accumulate"))
      .def("dot_planes", &P::DotPlanes, py::arg("a"), py::arg("b"), py::arg("y"), py::arg("accumulate"))
      .def("total", &P::Total, py::arg("value"), py::arg("a"), py::arg("b"))
      .def("dot_channels", &P::DotChannels, py::arg("section"), py::arg("a"), py::arg("b"), py::arg("scale"),
           py::arg("y"), py::arg("accumulate"))
      .def("largest_channel", &P::LargestChannel, py::arg("x"), py::arg("y"))
      .def("largest_channel_backward", &P::LargestChannelBackward, py::arg("x"), py::arg("dy"), py::arg("dx"),
           py::arg("shared"), py::arg("accumulate"))
      .def("response_norm", &P::ResponseNorm, py::arg("x"), py::arg("y"), py::arg("epsilon"))
      .def("response_norm_backward", &P::ResponseNormBackward, py::arg("x"), py::arg("dy"), py::arg("dx"),
           py::arg("epsilon"), py::arg("accumulate"))
      .def("layer_norm", &P::LayerNorm, py::arg("x"), py::arg("y"), py::arg("epsilon"), py::arg("centred"),
           py::arg("gamma"), py::arg("beta"))
      .def("layer_norm_backward", &P::LayerNormBackward, py::arg("x"), py::arg("dy"), py::arg("dx"), py::arg("epsilon"),
           py::arg("centred"), py::arg("gamma"), py::arg("beta"), py::arg("accumulate"))
      .def("attention", &P::Attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("seen"),
           py::arg("sizes"), py::arg("places"), py::arg("scales"), py::arg("safe"), py::arg("factors"),
           py::arg("biases"))
      .def("channel_attention", &P::ChannelAttention, py::arg("query"), py::arg("key"), py::arg("value"),
           py::arg("seen"), py::arg("sizes"), py::arg("pictures"), py::arg("firsts"), py::arg("scales"),
           py::arg("factors"))
      .def("channel_attention_backward", &P::ChannelAttentionBackward, py::arg("query"), py::arg("key"),
           py::arg("value"), py::arg("dy"), py::arg("dquery"), py::arg("dkey"), py::arg("dvalue"), py::arg("sizes"),
           py::arg("pictures"), py::arg("firsts"), py::arg("scales"), py::arg("factors"))
      .def("attention_backward", &P::AttentionBackward, py::arg("query"), py::arg("key"), py::arg("value"),
           py::arg("dy"), py::arg("dquery"), py::arg("dkey"), py::arg("dvalue"), py::arg("sizes"), py::arg("places"),
           py::arg("scales"), py::arg("safe"), py::arg("factors"), py::arg("biases"))
      .def("pixel_norm", &P::PixelNorm, py::arg("x"), py::arg("y"), py::arg("epsilon"))
      .def("pixel_norm_backward", &P::PixelNormBackward, py::arg("x"), py::arg("dy"), py::arg("dx"), py::arg("epsilon"),
           py::arg("accumulate"))
      .def("upsample2", &P::Upsample2, py::arg("bilinear"), py::arg("x"), py::arg("y"))
      .def("upsample2_backward", &P::Upsample2Backward, py::arg("bilinear"), py::arg("dy"), py::arg("dx"),
           py::arg("accumulate"))
      .def("shuffle", &P::Shuffle, py::arg("section"), py::arg("many"), py::arg("large"), py::arg("to_large"),
           py::arg("accumulate"))
      .def("resample", &P::Resample, py::arg("x"), py::arg("y"), py::arg("rows"), py::arg("columns"))
      .def("resample_backward", &P::ResampleBackward, py::arg("dy"), py::arg("dx"), py::arg("rows"), py::arg("columns"))
      .def("pool", &P::Pool, py::arg("x"), py::arg("y"), py::arg("kernel"), py::arg("stride"), py::arg("pad"),
           py::arg("counted"), py::arg("maximum"), py::arg("fill"), py::arg("mode"), py::arg("halo_pad"))
      .def("pool_backward", &P::PoolBackward, py::arg("x"), py::arg("dy"), py::arg("dx"), py::arg("kernel"),
           py::arg("stride"), py::arg("pad"), py::arg("counted"), py::arg("maximum"))
      .def("mean_to", &P::MeanTo, py::arg("x"), py::arg("y"))
      .def("mean_to_backward", &P::MeanToBackward, py::arg("dy"), py::arg("dx"))
      .def("mean", &P::Mean, py::arg("x"), py::arg("y"))
      .def("mean_backward", &P::MeanBackward, py::arg("dy"), py::arg("dx"))
      .def("load", &P::Load, py::arg("arrays"), py::arg("starts"), py::arg("counts"), py::arg("values"),
           py::arg("threads"))
      .def("run", &P::Run, py::arg("section"), py::arg("tensors"), py::arg("threads"))
      .def(
          "set_profile", [](P& self, bool on) { self.program().SetProfile(on); }, py::arg("on"))
      .def("profile", &P::Profile);
}

}  // namespace lipfast
