#include "engine/program.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <utility>

#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/taps.h"

namespace lipfast {
namespace {

constexpr int64_t kFloatBytes = sizeof(float);

std::string SizeLabel(const LaneMap& m) {
  return std::to_string(m.channels) + "x" + std::to_string(m.height) + "x" + std::to_string(m.width);
}

std::string ConvLabel(const char* what, const ConvShape& s, const LaneMap& y) {
  return std::string(what) + " " + std::to_string(s.in_channels) + "->" + std::to_string(s.out_channels) + " " +
         std::to_string(s.kernel_h) + "x" + std::to_string(s.kernel_w) + "/" + std::to_string(s.stride) + " " +
         std::to_string(y.height) + "x" + std::to_string(y.width);
}

void ClearPlane(const LaneMap& m, int64_t n, int64_t c) {
  const int64_t width = (m.block_w + 2 * m.halo) * kGrid * kGrid;
  for (int64_t row = -m.halo; row < m.block_h + m.halo; ++row) {
    std::memset(m.At(n, c, row, -m.halo), 0, static_cast<size_t>(width * kFloatBytes));
  }
}

}  // namespace

void Program::Allocate(int64_t map_floats, int64_t value_count, int64_t statistic_count) {
  memory_ = std::make_unique<Arena>(map_floats * kFloatBytes);
  vectors_ = std::make_unique<Arena>((2 * Padded(value_count) + Padded(statistic_count)) * kFloatBytes);
  map_floats_ = map_floats;
  value_count_ = value_count;
  statistic_count_ = statistic_count;
}

int64_t Program::bytes() const {
  int64_t bytes = 0;
  for (const auto& [saved, spare] : spares_) bytes += spare.bytes();
  for (const auto* arena : {&memory_, &vectors_, &scratch_, &prepared_}) bytes += *arena ? (*arena)->bytes() : 0;
  return bytes;
}

void Program::Load(const std::vector<Source>& sources, int threads) {
  ++loads_;
  constexpr int64_t kPiece = 1 << 15;  // floats
  std::vector<Source> pieces;
  for (Source rest : sources) {
    for (; rest.count > kPiece; rest = {rest.from + kPiece, rest.to + kPiece, rest.count - kPiece}) {
      pieces.push_back({rest.from, rest.to, kPiece});
    }
    pieces.push_back(rest);
  }
  ParallelFor(threads, static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    std::memcpy(pieces[i].to, pieces[i].from, static_cast<size_t>(pieces[i].count * kFloatBytes));
  });
}

int Program::AddMap(const LaneMap& shape, int64_t offset) {
  LaneMap map = shape;
  map.data = memory_->data() + offset;
  map.data = map.At(0, 0, map.halo, map.halo);
  maps_.push_back(map);
  return map_count() - 1;
}

int Program::AddChannels(int whole, int64_t first, int64_t last, int64_t step) {
  LaneMap map = maps_[whole];
  map.data = map.At(0, first);
  map.channels = (last - first + step - 1) / step;
  map.channel_stride *= step;
  maps_.push_back(map);
  return map_count() - 1;
}

int Program::AddConv(const ConvShape& shape, const ConvGeometry& geometry, const uint8_t* mask, ConvKernel asked,
                     bool exact) {
  convs_.push_back({std::make_unique<Conv>(shape, geometry, mask, asked, exact), shape, geometry, 0, -1});
  return conv_count() - 1;
}

float* Program::Scratch(int threads) {
  if (threads > scratch_threads_) {
#if defined(__GLIBC__)
    malloc_trim(0);  // planning and loading free lists and copies of all weights; glibc would keep them resident
#endif
    int64_t floats = scratch_floats_;
    for (const ConvEntry& entry : convs_) floats = std::max(floats, entry.conv->scratch_floats(threads));
    scratch_.reset();
    scratch_ = std::make_unique<Arena>(floats * kFloatBytes);
    scratch_threads_ = threads;
  }
  return scratch_->data();
}

void Program::Add(Section where, std::string label, std::function<void(const RunContext&)> run) {
  steps_[static_cast<int>(where)].push_back({std::move(label), std::move(run)});
}

const LaneMap& Program::plain_map(Section where, int plain) const {
  return maps_[plain_maps_[static_cast<int>(where)][plain]];
}

void Program::FromPlain(Section where, int plain, int map) {
  const int section = static_cast<int>(where);
  plain_count_[section] = std::max(plain_count_[section], plain + 1);
  plain_maps_[section].resize(plain_count_[section], map);
  plain_maps_[section][plain] = map;
  Add(where, "convert in " + SizeLabel(maps_[map]), [plain, to = maps_[map]](const RunContext& context) {
    Kernels<LaneKernels>().from_plain(context.plains[plain], to, context.threads);
  });
}

void Program::ToPlain(Section where, int map, int plain) {
  const int section = static_cast<int>(where);
  plain_count_[section] = std::max(plain_count_[section], plain + 1);
  plain_maps_[section].resize(plain_count_[section], map);
  plain_maps_[section][plain] = map;
  Add(where, "convert out " + SizeLabel(maps_[map]), [plain, from = maps_[map]](const RunContext& context) {
    Kernels<LaneKernels>().to_plain(from, context.plains[plain], context.threads);
  });
}

void Program::Clear(Section where, int map) {
  Add(where, "clear " + SizeLabel(maps_[map]), [m = maps_[map]](const RunContext& context) {
    ParallelFor(context.threads, m.batch * m.channels,
                [&](int64_t i) { ClearPlane(m, i / m.channels, i % m.channels); });
  });
}

void Program::FillHalo(Section where, int map, Padding mode, int64_t pad) {
  Add(where, "halo " + SizeLabel(maps_[map]), [m = maps_[map], mode, pad](const RunContext& context) {
    Kernels<LaneKernels>().fill_halo(m, mode, pad, context.threads);
  });
}

void Program::Reblock(Section where, int from, int to) {
  Add(where, "reblock " + SizeLabel(maps_[to]), [x = maps_[from], y = maps_[to]](const RunContext& context) {
    Kernels<LaneKernels>().reblock(x, y, context.threads);
  });
}

void Program::Flatten(Section where, int map, int rows, bool to_map) {
  const LaneMap &m = maps_[map], &r = maps_[rows];
  const int64_t pixels = m.height * m.width, features = m.channels * pixels;
  scratch_floats_ = std::max(scratch_floats_, m.pictures() * features);
  Add(where, "flatten " + SizeLabel(m), [m, r, pixels, features, to_map](const RunContext& context) {
    float* memory = context.scratch;  // read in two ways
    const PlainMap items = {memory, m.pictures(), m.channels, m.height, m.width, features, pixels, m.width, 1};
    const PlainMap by_feature = {memory, 1, features, r.height, r.width, 0, 1, r.width * features, features};
    const LaneKernels& kernels = Kernels<LaneKernels>();
    kernels.to_plain(to_map ? r : m, to_map ? by_feature : items, context.threads);
    kernels.from_plain(to_map ? items : by_feature, to_map ? m : r, context.threads);
  });
}

const float* Program::Prepared(int conv, const float* values, const LaneMap& x, const ConvEnd& end,
                               const RunContext& context) {
  ConvEntry& entry = convs_[conv];
  if (!prepared_) {
    int64_t floats = 0;
    for (ConvEntry& each : convs_) {
      each.prepared = floats;
      floats += Padded(each.conv->prepared_floats());
    }
    prepared_ = std::make_unique<Arena>(floats * kFloatBytes);
  }
  float* prepared = prepared_->data() + entry.prepared;
  if (!keeps_weights_ || entry.prepared_load != loads_) {
    entry.conv->Prepare(values, x, prepared, context.scratch, context.threads, end);
  }
  entry.prepared_load = loads_;
  return prepared;
}

void Program::RunConv(int conv, const float* values, const float* bias, const LaneMap& x, const LaneMap& y,
                      const ConvEnd& end, const RunContext& context) {
  const Conv& run = *convs_[conv].conv;
  if (keeps_weights_) {
    run.ForwardPrepared(Prepared(conv, values, x, end, context), bias, x, y, context.scratch, context.threads, end);
  } else {
    run.Forward(values, bias, x, y, context.scratch, context.threads, end);
  }
}

void Program::ConvForward(Section where, int conv, int64_t values, int64_t bias, int x, int y, const HaloSpec& halo) {
  const float* weight = this->values() + values;
  const float* shift = bias < 0 ? nullptr : this->values() + bias;
  Add(where, ConvLabel("conv", convs_[conv].shape, maps_[y]),
      [this, conv, weight, shift, halo, in = maps_[x], out = maps_[y]](const RunContext& context) {
        RunConv(conv, weight, shift, in, out, {{}, nullptr, nullptr, halo}, context);
      });
}

// Scale and bias of each channel that a convolution's bias and a BatchNorm come to.
struct Program::Affine {
  std::vector<float> scale, bias;
  int64_t load = -1;  // that they were made from
};

void Program::Renew(const FinishedConv& f, Affine* affine) const {
  if (keeps_weights_ && affine->load == loads_) return;
  affine->load = loads_;
  const NormNumbers norm = NumbersOf(f.offsets, f.epsilon);
  const int64_t channels = convs_[f.conv].shape.out_channels;
  affine->scale.resize(channels);
  affine->bias.resize(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const FinishAffine each = FinishAffineOf(norm, c);
    affine->scale[c] = each.scale;
    affine->bias[c] = (f.bias < 0 ? 0.0f : values()[f.bias + c] * each.scale) + each.shift;
  }
}

// What follows the sums, but for residual and halo.
ConvEnd Program::EndOf(const FinishedConv& f, const Affine& affine) const {
  const bool scaled = f.offsets.running_mean >= 0 || f.offsets.gamma >= 0;
  return {WithSlope(f.act, f.offsets), scaled ? affine.scale.data() : nullptr, nullptr, {}};
}

void Program::ConvFinish(const FinishedConv& f, int x, int residual, int y, const HaloSpec& halo) {
  Add(Section::kForward, ConvLabel("conv", convs_[f.conv].shape, maps_[y]),
      [this, f, halo, in = maps_[x], add = residual < 0 ? LaneMap{} : maps_[residual], out = maps_[y],
       affine = Affine{}](const RunContext& context) mutable {
        Renew(f, &affine);
        ConvEnd end = EndOf(f, affine);
        end.residual = add.data ? &add : nullptr;
        end.halo = halo;
        RunConv(f.conv, values() + f.values, affine.bias.data(), in, out, end, context);
      });
}

void Program::ConvPair(const FinishedConv& first, const FinishedConv& second, int x, const LaneMap& between,
                       const HaloSpec& between_halo, int y, const HaloSpec& halo) {
  const std::string label = ConvLabel("conv", convs_[first.conv].shape, between) + ", " +
                            ConvLabel("depthwise", convs_[second.conv].shape, maps_[y]);
  Add(Section::kForward, label,
      [this, first, second, between, between_halo, halo, in = maps_[x], out = maps_[y], one = Affine{},
       two = Affine{}](const RunContext& context) mutable {
        const auto prepare = [&](const FinishedConv& f, const LaneMap& read, Affine* affine) -> PreparedConv {
          Renew(f, affine);
          const float* weights = Prepared(f.conv, values() + f.values, read, EndOf(f, *affine), context);
          return {convs_[f.conv].conv.get(), weights, affine->bias.data(), WithSlope(f.act, f.offsets)};
        };
        Conv::RunPair(prepare(first, in, &one), prepare(second, between, &two), in, between, between_halo, out, halo,
                      context.threads);
      });
}

void Program::ConvInputGradient(Section where, int conv, int64_t values, int dy, int dx) {
  const float* weight = this->values() + values;
  Add(where, ConvLabel("conv dx", convs_[conv].shape, maps_[dy]),
      [run = convs_[conv].conv.get(), weight, in = maps_[dy], out = maps_[dx]](const RunContext& context) {
        run->InputGradient(weight, in, out, context.scratch, context.threads);
      });
}

void Program::ConvWeightGradient(int conv, int64_t values, int64_t bias, int x, int dy) {
  float* weight = gradients() + values;
  float* shift = GradientAt(bias);
  Add(Section::kBackward, ConvLabel("conv dw", convs_[conv].shape, maps_[dy]),
      [run = convs_[conv].conv.get(), weight, shift, in = maps_[x], out = maps_[dy]](const RunContext& context) {
        run->WeightGradient(in, out, weight, shift, context.scratch, context.threads);
      });
}

LivePixelMask Program::LiveMask(const LaneMap& m) {
  if (m.whole()) return {nullptr, nullptr};
  constexpr int kLaneCount = kGrid * kGrid;
  masks_.push_back(std::make_unique<std::vector<float>>((m.block_h + m.block_w) * kLaneCount));
  float* rows = masks_.back()->data();
  float* columns = rows + m.block_h * kLaneCount;
  for (int lane = 0; lane < kLaneCount; ++lane) {
    const LanePlace& place = PlaceOf(lane, m.grid);
    for (int64_t y = 0; y < m.block_h; ++y) {
      rows[y * kLaneCount + lane] = place.row * m.block_h + y < m.height ? 1.0f : 0.0f;
    }
    for (int64_t x = 0; x < m.block_w; ++x) {
      columns[x * kLaneCount + lane] = place.col * m.block_w + x < m.width ? 1.0f : 0.0f;
    }
  }
  return {rows, columns};
}

NormState Program::StateOf(const NormOffsets& offsets, int64_t channels) const {
  const auto at = [](float* base, int64_t offset) { return offset < 0 ? nullptr : base + offset; };
  return {at(values(), offsets.gamma),
          at(values(), offsets.beta),
          at(statistics(), offsets.running_mean),
          at(statistics(), offsets.running_variance),
          statistics() + offsets.saved,
          statistics() + offsets.saved + channels,
          {}};
}

SpareInputs* Program::SpareOf(int64_t saved) { return &spares_[saved]; }

void Program::NormForward(int x, int y, const NormSpec& spec, const NormOffsets& offsets, bool training,
                          const HaloSpec& halo, bool recover) {
  NormSpec full = spec;
  full.live = LiveMask(maps_[x]);
  if (training) keeps_weights_ = false;  // each run changes the running statistics
  Add(Section::kForward, "norm " + SizeLabel(maps_[x]),
      [full, halo, training, state = StateOf(offsets, spec.channels), in = maps_[x], out = maps_[y],
       spare = recover ? SpareOf(offsets.saved) : nullptr](const RunContext& context) mutable {
        const NormKernels& kernels = Kernels<NormKernels>();
        if (spare) {
          spare->Choose(in, state.gamma, state.beta);
          state.spare = spare->View();
        }
        (training ? kernels.train : kernels.evaluate)(in, out, full, state, halo, context.threads);
      });
}

void Program::NormBackward(int x, int dy, int dy2, int dx, const NormSpec& spec, const NormOffsets& offsets,
                           bool training, bool zero_halo, bool recover) {
  NormSpec full = spec;
  full.live = LiveMask(maps_[x]);
  float* dgamma = GradientAt(offsets.gamma);
  float* dbeta = GradientAt(offsets.beta);
  Add(Section::kBackward, "norm backward " + SizeLabel(maps_[x]),
      [full, training, zero_halo, dgamma, dbeta, state = StateOf(offsets, spec.channels), in = maps_[x],
       first = maps_[dy], second = dy2 < 0 ? LaneMap{} : maps_[dy2], out = maps_[dx],
       spare = recover ? SpareOf(offsets.saved) : nullptr](const RunContext& context) mutable {
        if (spare) state.spare = spare->View();
        Kernels<NormKernels>().backward(in, first, second.data ? &second : nullptr, out, full, state, training, dgamma,
                                        dbeta, zero_halo, context.threads);
      });
}

float* Program::GradientAt(int64_t offset) const { return offset < 0 ? nullptr : gradients() + offset; }

GroupNormState Program::GroupStateOf(const NormOffsets& offsets, int64_t count) const {
  const NormState state = StateOf(offsets, count);
  return {state.gamma, state.beta, state.mean, state.inverse_deviation};
}

void Program::GroupNorm(int x, int y, const GroupNormSpec& spec, const NormOffsets& offsets, const HaloSpec& halo) {
  GroupNormSpec full = spec;
  full.live = LiveMask(maps_[x]);
  Add(Section::kForward, "group norm " + SizeLabel(maps_[x]),
      [this, offsets, full, halo, state = GroupStateOf(offsets, maps_[x].batch * spec.groups * kGrid * kGrid),
       in = maps_[x], out = maps_[y]](const RunContext& context) mutable {
        full.act = WithSlope(full.act, offsets);
        Kernels<GroupNormKernels>().forward(in, out, full, state, halo, context.threads);
      });
}

void Program::GroupNormBackward(int x, int dy, int dx, const GroupNormSpec& spec, const NormOffsets& offsets) {
  GroupNormSpec full = spec;
  full.live = LiveMask(maps_[x]);
  float* dgamma = GradientAt(offsets.gamma);
  float* dbeta = GradientAt(offsets.beta);
  Add(Section::kBackward, "group norm backward " + SizeLabel(maps_[x]),
      [full, dgamma, dbeta, state = GroupStateOf(offsets, maps_[x].batch * spec.groups * kGrid * kGrid), in = maps_[x],
       gradient = maps_[dy], out = maps_[dx]](const RunContext& context) {
        Kernels<GroupNormKernels>().backward(in, gradient, out, full, state, dgamma, dbeta, context.threads);
      });
}

void Program::LayerNorm(int x, int y, float epsilon, bool centred, const NormOffsets& offsets) {
  const NormState state = StateOf(offsets, maps_[x].channels);
  Add(Section::kForward, "layer norm " + SizeLabel(maps_[x]),
      [spec = LayerNormSpec{epsilon, centred, state.gamma, state.beta}, in = maps_[x], out = maps_[y]](
          const RunContext& context) { Kernels<LayerNormKernels>().forward(in, out, spec, context.threads); });
}

void Program::LayerNormBackward(int x, int dy, int dx, float epsilon, bool centred, const NormOffsets& offsets,
                                bool accumulate) {
  const NormState state = StateOf(offsets, maps_[x].channels);
  scratch_floats_ = std::max(scratch_floats_, Kernels<LayerNormKernels>().backward_floats(maps_[x]));
  Add(Section::kBackward, "layer norm backward " + SizeLabel(maps_[x]),
      [spec = LayerNormSpec{epsilon, centred, state.gamma, state.beta}, accumulate, dgamma = GradientAt(offsets.gamma),
       dbeta = GradientAt(offsets.beta), in = maps_[x], gradient = maps_[dy],
       out = maps_[dx]](const RunContext& context) {
        Kernels<LayerNormKernels>().backward(in, gradient, out, spec, accumulate, dgamma, dbeta, context.scratch,
                                             context.threads);
      });
}

// A form with its lists as the kernels read them.
struct Program::AttentionLists {
  AttentionForm form;
  ProblemRuns runs;
  std::vector<ScoreBias> biases;
  std::vector<std::vector<int64_t>> places;
  std::vector<Neighbours> neighbours;
  std::vector<int32_t> learned;  // rows of the bias whose gradient is wanted
  std::optional<RisingOrder> of_queries, of_keys;
  const float* factors;
  float* factor_gradient;

  AttentionLists(const AttentionForm& given, float* values, float* gradients)
      : form(given),
        factors(given.factors < 0 ? nullptr : values + given.factors),
        factor_gradient(gradients && given.factors_trained ? gradients + given.factors : nullptr) {
    for (const BiasPlace& bias : form.biases) {
      const bool wanted = gradients && bias.trained;
      if (wanted) learned = bias.rows;
      biases.push_back({values + bias.start, bias.rows.data(), bias.count, wanted ? gradients + bias.start : nullptr});
    }
    places.reserve(7);
    neighbours.reserve(7);
  }

  AttentionSpec Spec() const {
    const int64_t count = static_cast<int64_t>(biases.size()), ends = static_cast<int64_t>(runs.ends.size());
    return {form.problems, form.features, form.value_features, form.queries,     form.keys,
            form.scale,    factors,       factor_gradient,     form.epsilon,     form.safe,
            biases.data(), count,         runs.order.data(),   runs.ends.data(), ends,
            runs.together};
  }

  // Heads in a map, as the queries (0), keys (1), values (2) or the result (3) have them. Queries, and keys, come
  // first.
  HeadMap In(const LaneMap& map, int which) {
    places.push_back(PlacesIn(map, form.places[which]));
    if (biases.empty()) {  // no score has a place of its own: any order will do
      std::optional<RisingOrder>& order = which == 0 || which == 3 ? of_queries : of_keys;
      if (!order) order.emplace(form.problems, places.back());
      places.back() = order->Of(places.back());
    }
    if (places.size() == 1) runs = RunsOf(form.problems, learned, places.front());
    neighbours.emplace_back(runs, places.back());
    return {map, places.back().data(), neighbours.back().runs.data(), neighbours.back().steps.data()};
  }
};

void Program::Attention(int query, int key, int value, int seen, const AttentionForm& form) {
  const auto lists = std::make_shared<AttentionLists>(form, values(), nullptr);
  const HeadMap q = lists->In(maps_[query], 0), k = lists->In(maps_[key], 1), v = lists->In(maps_[value], 2);
  const HeadMap y = lists->In(maps_[seen], 3);
  scratch_floats_ = std::max(scratch_floats_, Kernels<AttentionKernels>().floats(lists->Spec(), false));
  Add(Section::kForward, "attention " + SizeLabel(maps_[seen]), [=](const RunContext& context) {
    Kernels<AttentionKernels>().forward(q, k, v, y, lists->Spec(), context.scratch, context.threads);
  });
}

void Program::AttentionBackward(int query, int key, int value, int dy, int dquery, int dkey, int dvalue,
                                const AttentionForm& form) {
  const auto lists = std::make_shared<AttentionLists>(form, values(), gradients());
  const auto wanted = [&](int map, int which) { return map < 0 ? HeadMap{} : lists->In(maps_[map], which); };
  const HeadMap q = lists->In(maps_[query], 0), k = lists->In(maps_[key], 1), v = lists->In(maps_[value], 2);
  const HeadMap gradient = lists->In(maps_[dy], 3), dq = wanted(dquery, 0), dk = wanted(dkey, 1),
                dv = wanted(dvalue, 2);
  scratch_floats_ = std::max(scratch_floats_, Kernels<AttentionKernels>().floats(lists->Spec(), true));
  Add(Section::kBackward, "attention backward " + SizeLabel(maps_[dy]), [=](const RunContext& context) {
    const auto given = [](const HeadMap& m) { return m.at ? &m : nullptr; };
    Kernels<AttentionKernels>().backward(q, k, v, gradient, given(dq), given(dk), given(dv), lists->Spec(),
                                         context.scratch, context.threads);
  });
}

// The same of attention across channels.
struct Program::ChannelAttentionLists {
  ChannelAttentionForm form;
  ChannelAttentionSpec spec;
  std::vector<std::vector<int64_t>> places;

  ChannelAttentionLists(const ChannelAttentionForm& given, float* values, float* gradients, const LivePixelMask& live)
      : form(given), spec{form.problems, form.channels, form.scale, nullptr, nullptr, form.epsilon, live} {
    if (form.factors >= 0) spec.factors = values + form.factors;
    if (gradients && form.factors_trained) spec.factor_gradient = gradients + form.factors;
    places.reserve(7);
  }

  // Heads in a map, as the queries (0), keys (1), values (2) or the result (3) have them.
  ChannelHeads In(const LaneMap& map, int which) {
    std::vector<int64_t> at(form.problems);
    for (int64_t i = 0; i < form.problems; ++i) {
      at[i] = form.pictures[i] * map.batch_stride + form.firsts[which][i] * map.channel_stride;
    }
    places.push_back(std::move(at));
    return {map, places.back().data()};
  }
};

void Program::ChannelAttention(int query, int key, int value, int seen, const ChannelAttentionForm& form) {
  const auto lists = std::make_shared<ChannelAttentionLists>(form, values(), nullptr, LiveMask(maps_[seen]));
  const ChannelHeads q = lists->In(maps_[query], 0), k = lists->In(maps_[key], 1), v = lists->In(maps_[value], 2);
  const ChannelHeads y = lists->In(maps_[seen], 3);
  scratch_floats_ = std::max(scratch_floats_, Kernels<ChannelAttentionKernels>().floats(lists->spec, false));
  Add(Section::kForward, "channel attention " + SizeLabel(maps_[seen]), [=](const RunContext& context) {
    Kernels<ChannelAttentionKernels>().forward(q, k, v, y, lists->spec, context.scratch, context.threads);
  });
}

void Program::ChannelAttentionBackward(int query, int key, int value, int dy, int dquery, int dkey, int dvalue,
                                       const ChannelAttentionForm& form) {
  const auto lists = std::make_shared<ChannelAttentionLists>(form, values(), gradients(), LiveMask(maps_[dy]));
  const auto wanted = [&](int map, int which) { return map < 0 ? ChannelHeads{} : lists->In(maps_[map], which); };
  const ChannelHeads q = lists->In(maps_[query], 0), k = lists->In(maps_[key], 1), v = lists->In(maps_[value], 2);
  const ChannelHeads gradient = lists->In(maps_[dy], 3), dq = wanted(dquery, 0), dk = wanted(dkey, 1),
                     dv = wanted(dvalue, 2);
  scratch_floats_ = std::max(scratch_floats_, Kernels<ChannelAttentionKernels>().floats(lists->spec, true));
  Add(Section::kBackward, "channel attention backward " + SizeLabel(maps_[dy]), [=](const RunContext& context) {
    const auto given = [](const ChannelHeads& m) { return m.at ? &m : nullptr; };
    Kernels<ChannelAttentionKernels>().backward(q, k, v, gradient, given(dq), given(dk), given(dv), lists->spec,
                                                context.scratch, context.threads);
  });
}

void Program::ChannelSums(int64_t bias, int dy) {
  Add(Section::kBackward, "bias " + SizeLabel(maps_[dy]),
      [sums = gradients() + bias, m = maps_[dy]](const RunContext& context) {
        std::vector<Region> pictures(m.batch);
        for (int64_t n = 0; n < m.batch; ++n) {
          Region& picture = pictures[n];
          picture.rows = m.block_h, picture.cols = m.block_w;
          picture.out = m.At(n, 0);
          picture.out_channel = m.channel_stride, picture.out_row = m.row_stride, picture.out_col = kGrid * kGrid;
        }
        Kernels<TapKernels>().channel_sums(pictures.data(), m.batch, m.channels, sums, context.threads);
      });
}

NormNumbers Program::NumbersOf(const NormOffsets& offsets, float epsilon) const {
  const auto at = [](const float* base, int64_t offset) { return offset < 0 ? nullptr : base + offset; };
  return {at(values(), offsets.gamma),
          at(values(), offsets.beta),
          at(statistics(), offsets.running_mean),
          at(statistics(), offsets.running_variance),
          epsilon,
          offsets.gamma_step,
          offsets.beta_step};
}

ActivationSpec Program::WithSlope(ActivationSpec act, const NormOffsets& offsets) const {
  return {act.kind, offsets.slope < 0 ? act.slope : values()[offsets.slope]};
}

void Program::Finish(Section where, int x, int residual, int factor, int y, float epsilon, const NormOffsets& offsets,
                     ActivationSpec act, const HaloSpec& halo) {
  Add(where, "finish " + SizeLabel(maps_[y]),
      [this, offsets, norm = NumbersOf(offsets, epsilon), act, halo, in = maps_[x],
       add = residual < 0 ? LaneMap{} : maps_[residual], times = factor < 0 ? LaneMap{} : maps_[factor],
       out = maps_[y]](const RunContext& context) {
        const auto given = [](const LaneMap& m) { return m.data ? &m : nullptr; };
        Kernels<FinishKernels>().finish(in, given(add), given(times), out, norm, WithSlope(act, offsets), halo,
                                        context.threads);
      });
}

void Program::Prelu(int x, int y, int64_t slopes, int64_t step) {
  Add(Section::kForward, "prelu " + SizeLabel(maps_[x]),
      [spec = PreluSpec{values() + slopes, step}, in = maps_[x], out = maps_[y]](const RunContext& context) {
        Kernels<PreluKernels>().forward(in, out, spec, context.threads);
      });
}

void Program::PreluBackward(int x, int dy, int dx, int64_t slopes, int64_t step, bool accumulate) {
  const LaneMap& m = maps_[x];
  scratch_floats_ = std::max(scratch_floats_, m.batch * m.channels);
  Add(Section::kBackward, "prelu backward " + SizeLabel(m),
      [spec = PreluSpec{values() + slopes, step}, accumulate, live = LiveMask(m), dslopes = GradientAt(slopes), in = m,
       gradient = maps_[dy], out = dx < 0 ? LaneMap{} : maps_[dx]](const RunContext& context) {
        Kernels<PreluKernels>().backward(in, gradient, out.data ? &out : nullptr, spec, live, accumulate, dslopes,
                                         context.scratch, context.threads);
      });
}

void Program::Activate(int x, int y, ActivationSpec act) {
  Add(Section::kForward, "activation " + SizeLabel(maps_[x]),
      [act, in = maps_[x], out = maps_[y]](const RunContext& context) {
        Kernels<PointwiseKernels>().activate(in, out, act, context.threads);
      });
}

void Program::ActivateBackward(int x, int dy, int dx, ActivationSpec act, bool accumulate) {
  Add(Section::kBackward, "activation backward " + SizeLabel(maps_[x]),
      [act, accumulate, in = maps_[x], gradient = maps_[dy], out = maps_[dx]](const RunContext& context) {
        Kernels<PointwiseKernels>().activate_backward(in, gradient, out, act, accumulate, context.threads);
      });
}

void Program::Combine(Section where, int a, float a_scale, int b, float b_scale, float shift, int y) {
  Add(where, "combine " + SizeLabel(maps_[y]),
      [=, first = maps_[a], second = b < 0 ? LaneMap{} : maps_[b], out = maps_[y]](const RunContext& context) {
        Kernels<PointwiseKernels>().combine(first, a_scale, second.data ? &second : nullptr, b_scale, shift, out,
                                            context.threads);
      });
}

void Program::Multiply(Section where, int a, int b, int y, bool accumulate) {
  Add(where, "multiply " + SizeLabel(maps_[y]),
      [accumulate, first = maps_[a], second = maps_[b], out = maps_[y]](const RunContext& context) {
        Kernels<PointwiseKernels>().multiply(first, second, out, accumulate, context.threads);
      });
}

void Program::DotPlanes(int a, int b, int y, bool accumulate) {
  Add(Section::kBackward, "dot " + SizeLabel(maps_[a]),
      [accumulate, live = LiveMask(maps_[a]), first = maps_[a], second = b < 0 ? LaneMap{} : maps_[b],
       out = maps_[y]](const RunContext& context) {
        Kernels<PointwiseKernels>().dot_planes(first, second.data ? &second : nullptr, out, live, accumulate,
                                               context.threads);
      });
}

void Program::Total(int64_t value, int a, int b) {
  const LaneMap& m = maps_[a];
  scratch_floats_ = std::max(scratch_floats_, m.batch * m.channels);
  Add(Section::kBackward, "total " + SizeLabel(m),
      [sum = gradients() + value, live = LiveMask(m), first = m,
       second = b < 0 ? LaneMap{} : maps_[b]](const RunContext& context) {
        Kernels<PointwiseKernels>().total(first, second.data ? &second : nullptr, live, context.scratch, sum,
                                          context.threads);
      });
}

void Program::DotChannels(Section where, int a, int b, float scale, int y, bool accumulate) {
  Add(where, "dot of channels " + SizeLabel(maps_[a]),
      [scale, accumulate, first = maps_[a], second = b < 0 ? LaneMap{} : maps_[b],
       out = maps_[y]](const RunContext& context) {
        Kernels<ChannelKernels>().dot(first, second.data ? &second : nullptr, scale, out, accumulate, context.threads);
      });
}

void Program::LargestChannel(int x, int y) {
  Add(Section::kForward, "largest channel " + SizeLabel(maps_[x]),
      [in = maps_[x], out = maps_[y]](const RunContext& context) {
        Kernels<ChannelKernels>().largest(in, out, context.threads);
      });
}

void Program::LargestChannelBackward(int x, int dy, int dx, bool shared, bool accumulate) {
  Add(Section::kBackward, "largest channel backward " + SizeLabel(maps_[x]),
      [shared, accumulate, in = maps_[x], gradient = maps_[dy], out = maps_[dx]](const RunContext& context) {
        Kernels<ChannelKernels>().largest_backward(in, gradient, out, shared, accumulate, context.threads);
      });
}

void Program::ResponseNorm(int x, int y, float epsilon) {
  Add(Section::kForward, "response norm " + SizeLabel(maps_[x]),
      [epsilon, live = LiveMask(maps_[x]), in = maps_[x], out = maps_[y]](const RunContext& context) {
        Kernels<ResponseNormKernels>().forward(in, out, epsilon, live, context.threads);
      });
}

void Program::ResponseNormBackward(int x, int dy, int dx, float epsilon, bool accumulate) {
  const LaneMap& m = maps_[x];
  scratch_floats_ = std::max(scratch_floats_, m.batch * m.channels * kGrid * kGrid);
  Add(Section::kBackward, "response norm backward " + SizeLabel(m),
      [epsilon, accumulate, live = LiveMask(m), in = m, gradient = maps_[dy],
       out = maps_[dx]](const RunContext& context) {
        Kernels<ResponseNormKernels>().backward(in, gradient, out, epsilon, live, accumulate, context.scratch,
                                                context.threads);
      });
}

void Program::PixelNorm(int x, int y, float epsilon) {
  Add(Section::kForward, "pixel norm " + SizeLabel(maps_[x]),
      [epsilon, in = maps_[x], out = maps_[y]](const RunContext& context) {
        Kernels<PointwiseKernels>().pixel_norm(in, out, epsilon, context.threads);
      });
}

void Program::PixelNormBackward(int x, int dy, int dx, float epsilon, bool accumulate) {
  Add(Section::kBackward, "pixel norm backward " + SizeLabel(maps_[x]),
      [epsilon, accumulate, in = maps_[x], gradient = maps_[dy], out = maps_[dx]](const RunContext& context) {
        Kernels<PointwiseKernels>().pixel_norm_backward(in, gradient, out, epsilon, accumulate, context.threads);
      });
}

void Program::Upsample2(bool bilinear, int x, int y) {
  Add(Section::kForward, "upsample " + SizeLabel(maps_[y]),
      [bilinear, in = maps_[x], out = maps_[y]](const RunContext& context) {
        const ResampleKernels& kernels = Kernels<ResampleKernels>();
        (bilinear ? kernels.bilinear2 : kernels.nearest2)(in, out, context.threads);
      });
}

void Program::Upsample2Backward(bool bilinear, int dy, int dx, bool accumulate) {
  Add(Section::kBackward, "upsample backward " + SizeLabel(maps_[dy]),
      [bilinear, accumulate, gradient = maps_[dy], out = maps_[dx]](const RunContext& context) {
        const ResampleKernels& kernels = Kernels<ResampleKernels>();
        (bilinear ? kernels.bilinear2_backward : kernels.nearest2_backward)(gradient, out, accumulate, context.threads);
      });
}

void Program::Shuffle(Section where, int many, int large, bool to_large, bool accumulate) {
  Add(where, "shuffle " + SizeLabel(maps_[large]),
      [to_large, accumulate, channels = maps_[many], pixels = maps_[large]](const RunContext& context) {
        Kernels<ResampleKernels>().shuffle(channels, pixels, to_large, accumulate, context.threads);
      });
}

void Program::Resample(int x, int y, const AxisTable& rows, const AxisTable& columns) {
  Add(Section::kForward, "resample " + SizeLabel(maps_[y]),
      [rows, columns, in = maps_[x], out = maps_[y]](const RunContext& context) {
        Kernels<ResampleKernels>().general(in, out, rows.View(), columns.View(), context.threads);
      });
}

void Program::ResampleBackward(int dy, int dx, const AxisTable& rows, const AxisTable& columns) {
  Add(Section::kBackward, "resample backward " + SizeLabel(maps_[dy]),
      [rows, columns, gradient = maps_[dy], out = maps_[dx]](const RunContext& context) {
        Kernels<ResampleKernels>().general_backward(gradient, out, rows.View(), columns.View(), context.threads);
      });
}

void Program::Pool(int x, int y, const PoolSpec& spec, const HaloSpec& halo) {
  Add(Section::kForward, "pool " + SizeLabel(maps_[x]),
      [spec, halo, in = maps_[x], out = maps_[y]](const RunContext& context) {
        Kernels<PoolKernels>().forward(in, out, spec, halo, context.threads);
      });
}

void Program::PoolBackward(int x, int dy, int dx, const PoolSpec& spec) {
  Add(Section::kBackward, "pool backward " + SizeLabel(maps_[x]),
      [spec, in = maps_[x], gradient = maps_[dy], out = maps_[dx]](const RunContext& context) {
        Kernels<PoolKernels>().backward(in, gradient, out, spec, context.threads);
      });
}

void Program::Mean(int x, int y) {
  Add(Section::kForward, "mean " + SizeLabel(maps_[x]),
      [live = LiveMask(maps_[x]), in = maps_[x], out = maps_[y]](const RunContext& context) {
        Kernels<PoolKernels>().mean(in, out, live, context.threads);
      });
}

void Program::MeanBackward(int dy, int dx) {
  Add(Section::kBackward, "mean backward " + SizeLabel(maps_[dx]),
      [gradient = maps_[dy], out = maps_[dx]](const RunContext& context) {
        Kernels<PoolKernels>().mean_backward(gradient, out, context.threads);
      });
}

void Program::MeanTo(int x, int y) {
  Add(Section::kForward, "mean to " + SizeLabel(maps_[y]), [in = maps_[x], out = maps_[y]](const RunContext& context) {
    Kernels<PoolKernels>().mean_to(in, out, context.threads);
  });
}

void Program::MeanToBackward(int dy, int dx) {
  Add(Section::kBackward, "mean to backward " + SizeLabel(maps_[dy]),
      [gradient = maps_[dy], out = maps_[dx]](const RunContext& context) {
        Kernels<PoolKernels>().mean_to_backward(gradient, out, context.threads);
      });
}

void Program::Run(Section where, const PlainMap* plains, int threads) {
  using Clock = std::chrono::steady_clock;
  if (threads > 1) EndOpenMpThreads();
  std::vector<Step>& steps = steps_[static_cast<int>(where)];
  Pace& pace = paces_[static_cast<int>(where)];
  float* scratch = Scratch(threads);
  pace.Begin(steps.size(), threads);
  if (pace.Wakes()) ParallelFor(threads, threads, [](int64_t) {});
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto start = Clock::now();
    steps[i].run({plains, scratch, pace.IsAlone(i) ? 1 : threads});
    const double took = std::chrono::duration<double>(Clock::now() - start).count();
    pace.Took(i, took);
    if (profile_) steps[i].seconds += took;
    if (pace.Looks()) pace.Saw(RoundTrip());  // no part of the step, and what it says is of the next
  }
}

void Program::SetProfile(bool on) {
  profile_ = on;
  for (auto& steps : steps_) {
    for (Step& step : steps) step.seconds = 0;
  }
}

std::vector<StepTime> Program::Profile() const {
  std::vector<StepTime> times;
  for (int section = 0; section < 2; ++section) {
    for (const Step& step : steps_[section]) times.push_back({step.label, static_cast<Section>(section), step.seconds});
  }
  return times;
}

}  // namespace lipfast
