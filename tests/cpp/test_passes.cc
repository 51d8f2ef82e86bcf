// Norm, finish, pointwise, pooling and resampling passes, pruning and optimiser steps against plain loops.
#include <algorithm>
#include <functional>
#include <numeric>

#include "cpu/adam.h"
#include "cpu/attention.h"
#include "cpu/channel_attention.h"
#include "cpu/channels.h"
#include "cpu/finish.h"
#include "cpu/group_norm.h"
#include "cpu/heads.h"
#include "cpu/isa.h"
#include "cpu/layer_norm.h"
#include "cpu/noise.h"
#include "cpu/norm.h"
#include "cpu/pointwise.h"
#include "cpu/pool2d.h"
#include "cpu/prelu.h"
#include "cpu/prune.h"
#include "cpu/resample.h"
#include "cpu/response_norm.h"
#include "support.h"

namespace lipfast {
namespace {

constexpr double kTolerance = 1e-5;

// A map, its tensor and its sizes. Blocks larger than the picture needs have dead pixels.
struct Picture {
  Picture(int64_t n, int64_t c, int64_t h, int64_t w, int64_t block_h, int64_t block_w, int64_t halo, std::mt19937& r,
          int64_t grid = kGrid)
      : map(n, c, h, w, block_h, block_w, halo, grid), tensor(Draw(n * c * h * w, r)) {
    Write();
  }
  PlainMap plain() {
    const LaneMap& m = map.lanes;
    return Plain(tensor, m.pictures(), m.channels, m.height, m.width);
  }
  void Write() { Kernels<LaneKernels>().from_plain(plain(), map.lanes, 1); }
  // What the map holds now.
  Tensor Read() {
    Kernels<LaneKernels>().to_plain(map.lanes, plain(), 1);
    return tensor;
  }
  void Scale(float factor) {
    for (float& number : tensor) number *= factor;
    Write();
  }
  int64_t pixels() const { return map.lanes.height * map.lanes.width; }
  Map map;
  Tensor tensor;
};

constexpr int64_t kBatch = 2, kChannels = 5, kHeight = 9, kWidth = 14, kBlockH = 3, kBlockW = 4;

Picture MakePicture(std::mt19937& random, int64_t halo) {
  return Picture(kBatch, kChannels, kHeight, kWidth, kBlockH, kBlockW, halo, random);
}

int64_t ChannelOf(int64_t i) { return i / (kHeight * kWidth) % kChannels; }

// One where a lane holds a pixel, for each row and column of a block.
struct LiveLanes {
  Floats rows{kBlockH * 16}, columns{kBlockW * 16};
  LiveLanes() {
    for (int64_t lane = 0; lane < 16; ++lane) {
      for (int64_t r = 0; r < kBlockH; ++r) rows.data[r * 16 + lane] = lane / 4 * kBlockH + r < kHeight;
      for (int64_t c = 0; c < kBlockW; ++c) columns.data[c * 16 + lane] = lane % 4 * kBlockW + c < kWidth;
    }
  }
  LivePixelMask mask() const { return {rows.data, columns.data}; }
  // Puts ones where there is no pixel, as kernels may do.
  void Spoil(const Picture& picture) const {
    const LaneMap& m = picture.map.lanes;
    for (int64_t plane = 0; plane < m.batch * m.channels; ++plane) {
      for (int64_t i = 0; i < m.block_h * m.block_w * 16; ++i) {
        const int64_t lane = i % 16, col = i / 16 % m.block_w, row = i / 16 / m.block_w;
        float& number = m.At(plane / m.channels, plane % m.channels, row, col)[lane];
        if (rows.data[row * 16 + lane] * columns.data[col * 16 + lane] == 0) number = 1;
      }
    }
  }
};

void RunNorm(int threads, const std::string& name) {
  std::mt19937 random(3);
  Picture x = MakePicture(random, 1), y = MakePicture(random, 1), dy = MakePicture(random, 1);
  Tensor gamma = Draw(kChannels, random), beta = Draw(kChannels, random);
  Tensor running_mean(kChannels), running_variance(kChannels, 1.0f), mean(kChannels), inverse(kChannels);
  const LiveLanes live;
  const Tensor in = x.tensor, gradient = dy.tensor;
  const NormSpec spec = {kChannels, 1e-5f, 0.1f, {Activation::kLeaky, 0.2f}, live.mask()};
  const NormState state = {gamma.data(),   beta.data(), running_mean.data(), running_variance.data(), mean.data(),
                           inverse.data(), {}};
  const NormKernels& kernels = Kernels<NormKernels>();
  kernels.train(x.map.lanes, y.map.lanes, spec, state, {true, Padding::kReflect, 1}, threads);
  const int64_t count = kBatch * kHeight * kWidth;
  std::vector<double> sum(kChannels), squares(kChannels), want(in.size());
  for (size_t i = 0; i < in.size(); ++i) sum[ChannelOf(i)] += in[i];
  for (size_t i = 0; i < in.size(); ++i) squares[ChannelOf(i)] += std::pow(in[i] - sum[ChannelOf(i)] / count, 2);
  std::vector<double> normal(in.size()), slope(in.size()), d(in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    const int64_t c = ChannelOf(i);
    normal[i] = (in[i] - sum[c] / count) / std::sqrt(squares[c] / count + 1e-5);
    const double z = gamma[c] * normal[i] + beta[c];
    slope[i] = z > 0 ? 1.0 : 0.2;
    want[i] = slope[i] * z;
  }
  Expect(Error(y.Read(), want) < kTolerance, name + " norm forward");
  std::vector<double> dgamma_want(kChannels), dbeta_want(kChannels);
  for (size_t i = 0; i < in.size(); ++i) {
    d[i] = slope[i] * gradient[i];
    dgamma_want[ChannelOf(i)] += d[i] * normal[i];
    dbeta_want[ChannelOf(i)] += d[i];
  }
  for (size_t i = 0; i < in.size(); ++i) {
    const int64_t c = ChannelOf(i);
    const double rest = d[i] - dbeta_want[c] / count - normal[i] * dgamma_want[c] / count;
    want[i] = gamma[c] / std::sqrt(squares[c] / count + 1e-5) * rest;
  }
  Tensor dgamma(kChannels), dbeta(kChannels);
  kernels.backward(x.map.lanes, dy.map.lanes, nullptr, dy.map.lanes, spec, state, true, dgamma.data(), dbeta.data(),
                   true, threads);
  Expect(Error(dy.Read(), want) < kTolerance, name + " norm backward");
  Expect(Error(dgamma, dgamma_want) < kTolerance, name + " norm gamma gradient");
  Expect(Error(dbeta, dbeta_want) < kTolerance, name + " norm beta gradient");
}

// All channels of an item are one group.
void RunGroupNorm(int threads, const std::string& name) {
  std::mt19937 random(4);
  Picture x = MakePicture(random, 1), y = MakePicture(random, 1), dy = MakePicture(random, 1);
  Tensor gamma = Draw(kChannels, random), beta = Draw(kChannels, random);
  Tensor mean(kBatch * kGrid * kGrid), inverse(kBatch * kGrid * kGrid);
  const LiveLanes live;
  const Tensor in = x.tensor, gradient = dy.tensor;
  const GroupNormSpec spec = {1, 1e-5f, {Activation::kLeaky, 0.2f}, live.mask()};
  const GroupNormState state = {gamma.data(), beta.data(), mean.data(), inverse.data()};
  const GroupNormKernels& kernels = Kernels<GroupNormKernels>();
  kernels.forward(x.map.lanes, y.map.lanes, spec, state, {true, Padding::kReflect, 1}, threads);
  const int64_t count = kChannels * kHeight * kWidth;
  const auto item = [count](size_t i) { return i / count; };
  std::vector<double> sum(kBatch), squares(kBatch), want(in.size()), normal(in.size()), d(in.size());
  for (size_t i = 0; i < in.size(); ++i) sum[item(i)] += in[i];
  for (size_t i = 0; i < in.size(); ++i) squares[item(i)] += std::pow(in[i] - sum[item(i)] / count, 2);
  std::vector<double> dgamma_want(kChannels), dbeta_want(kChannels), constant(kBatch), along(kBatch);
  for (size_t i = 0; i < in.size(); ++i) {
    const int64_t c = ChannelOf(i);
    normal[i] = (in[i] - sum[item(i)] / count) / std::sqrt(squares[item(i)] / count + 1e-5);
    const double z = gamma[c] * normal[i] + beta[c];
    d[i] = (z > 0 ? 1.0 : 0.2) * gradient[i];
    want[i] = (z > 0 ? 1.0 : 0.2) * z;
    dgamma_want[c] += d[i] * normal[i];
    dbeta_want[c] += d[i];
    constant[item(i)] += gamma[c] * d[i] / count;
    along[item(i)] += gamma[c] * d[i] * normal[i] / count;
  }
  Expect(Error(y.Read(), want) < kTolerance, name + " group norm forward");
  for (size_t i = 0; i < in.size(); ++i) {
    const double rest = gamma[ChannelOf(i)] * d[i] - constant[item(i)] - normal[i] * along[item(i)];
    want[i] = rest / std::sqrt(squares[item(i)] / count + 1e-5);
  }
  Tensor dgamma(kChannels), dbeta(kChannels);
  kernels.backward(x.map.lanes, dy.map.lanes, dy.map.lanes, spec, state, dgamma.data(), dbeta.data(), threads);
  Expect(Error(dy.Read(), want) < kTolerance, name + " group norm backward");
  Expect(Error(dgamma, dgamma_want) < kTolerance, name + " group norm gamma gradient");
  Expect(Error(dbeta, dbeta_want) < kTolerance, name + " group norm beta gradient");
}

// Each pixel over its channels; more of them than are summed up at once.
void RunNormOfPixels(bool centred, bool accumulate, int threads, const std::string& name) {
  std::mt19937 random(5);
  constexpr int64_t kBatches = 2, kMany = 70, kRows = 9, kCols = 18, kPlane = kRows * kCols;
  const auto picture = [&](int64_t halo) { return Picture(kBatches, kMany, kRows, kCols, 3, 5, halo, random); };
  Picture x = picture(1), y = picture(0), dy = picture(0), dx = picture(1);
  const Tensor gamma = Draw(kMany, random), beta = Draw(kMany, random), before = dx.tensor;
  const LayerNormSpec spec = {1e-5f, centred, gamma.data(), beta.data()};
  const LayerNormKernels& kernels = Kernels<LayerNormKernels>();
  kernels.forward(x.map.lanes, y.map.lanes, spec, threads);
  std::vector<double> want(x.tensor.size()), dx_want(want.size()), dgamma_want(kMany), dbeta_want(kMany);
  for (int64_t i = 0; i < kBatches * kPlane; ++i) {
    const auto at = [i](int64_t c) { return (i / kPlane * kMany + c) * kPlane + i % kPlane; };
    double sum = 0, squares = 0, constant = 0, along = 0;
    for (int64_t c = 0; c < kMany; ++c) sum += x.tensor[at(c)];
    for (int64_t c = 0; c < kMany; ++c) squares += std::pow(x.tensor[at(c)] - sum / kMany, 2);
    const double inverse = 1 / std::sqrt(squares / kMany + 1e-5);
    const auto standard = [&](int64_t c) { return (x.tensor[at(c)] - sum / kMany) * inverse; };
    const auto normal = [&](int64_t c) { return centred ? standard(c) : x.tensor[at(c)] * inverse; };
    for (int64_t c = 0; c < kMany; ++c) {
      want[at(c)] = gamma[c] * normal(c) + beta[c];
      dgamma_want[c] += dy.tensor[at(c)] * normal(c);
      dbeta_want[c] += dy.tensor[at(c)];
      constant += centred ? gamma[c] * dy.tensor[at(c)] / kMany : 0.0;
      along += gamma[c] * dy.tensor[at(c)] * normal(c) / kMany;
    }
    for (int64_t c = 0; c < kMany; ++c) {
      const double change = inverse * (gamma[c] * dy.tensor[at(c)] - constant - standard(c) * along);
      dx_want[at(c)] = change + (accumulate ? before[at(c)] : 0.0);
    }
  }
  Expect(Error(y.Read(), want) < kTolerance, name + " layer norm forward");
  const Floats partial(kernels.backward_floats(x.map.lanes));
  Tensor dgamma(kMany), dbeta(kMany);
  Picture& result = accumulate ? dx : dy;  // the other case overwrites what it reads
  kernels.backward(x.map.lanes, dy.map.lanes, result.map.lanes, spec, accumulate, dgamma.data(), dbeta.data(),
                   partial.data, threads);
  Expect(Error(result.Read(), dx_want) < kTolerance, name + " layer norm backward");
  Expect(Error(dgamma, dgamma_want) < kTolerance, name + " layer norm gamma gradient");
  Expect(Error(dbeta, dbeta_want) < kTolerance, name + " layer norm beta gradient");
}

void RunLayerNorm(int threads, const std::string& name) {
  for (const bool centred : {true, false}) {
    const std::string form = name + (centred ? "" : " not centred");
    RunNormOfPixels(centred, false, threads, form);
    RunNormOfPixels(centred, true, threads, form + " added");
  }
}

// Where tokens of heads lie in a picture of kChannels channels: `shift` pixels on, heads `apart` channels apart.
HeadPlaces PlacesOf(int64_t pictures, int64_t heads, int64_t tokens, int64_t first, int64_t apart, int64_t shift) {
  HeadPlaces places;
  for (int64_t problem = 0; problem < pictures * heads; ++problem) {
    places.channels.push_back(static_cast<int32_t>(first + problem % heads * apart));
    for (int64_t token = 0; token < tokens; ++token) {  // pictures in turn, as attention of windows has them
      places.pixels.push_back(static_cast<int32_t>((token + shift) % tokens * pictures + problem / heads));
    }
  }
  return places;
}

// The same where pictures are windows in the sixteen lanes of a map `width` wide on the full grid, but for their last
// tokens, which lie in the lane to the right.
HeadPlaces PlacesInLanes(int64_t heads, int64_t tokens, int64_t first, int64_t apart, int64_t shift, int64_t width) {
  HeadPlaces places = PlacesOf(16, heads, tokens, first, apart, shift);
  for (int32_t& pixel : places.pixels) {
    const int64_t token = pixel / 16, lane = pixel % 16, column = lane % 4 + (token + 1 == tokens);
    pixel = static_cast<int32_t>(lane / 4 * width + column % 4 * ((width + 3) / 4) + token);
  }
  return places;
}

// Attention and its gradients, of maps with more pixels than tokens; queries and the rest lie in different orders.
// `epsilon` below 0: scores are no cosines.
void RunAttentionOf(int64_t queries, int64_t keys, int64_t grid, float epsilon, bool in_lanes, int threads,
                    const std::string& name) {
  std::mt19937 random(7);
  constexpr int64_t kHeads = 3, kFeatures = 5, kOfValue = 8;
  const int64_t pictures = in_lanes ? 16 : 2, problems = pictures * kHeads;
  constexpr int64_t kBoth = kFeatures + kOfValue, kWide = 1 + kHeads * kOfValue;
  constexpr float kScale = 0.7f;
  const auto width_of = [&](int64_t tokens) {  // of several items where the grid is small
    const int64_t items = grid == 4 ? 1 : 3;
    return in_lanes ? 4 * tokens + 3 : (pictures * tokens + 4 * items - 1) / (4 * items) + 1;
  };
  const auto places_of = [&](int64_t tokens, int64_t first, int64_t apart, int64_t shift) {
    return in_lanes ? PlacesInLanes(kHeads, tokens, first, apart, shift, width_of(tokens))
                    : PlacesOf(pictures, kHeads, tokens, first, apart, shift);
  };
  const HeadPlaces places[4] = {places_of(queries, 1, kFeatures, 1), places_of(keys, 0, kBoth, 0),
                                places_of(keys, kFeatures, kBoth, 0), places_of(queries, 0, kOfValue, 2)};
  const auto picture = [&](int64_t channels, int64_t tokens) {
    const int64_t items = grid == 4 ? 1 : 3, width = width_of(tokens);
    return Picture(items, channels, 4, width, (4 + grid - 1) / grid, (width + grid - 1) / grid, 0, random, grid);
  };
  Picture q = picture(kWide, queries), rest = picture(kHeads * kBoth, keys), y = picture(kWide, queries);
  Picture dy = picture(kWide, queries), dq = picture(kWide, queries), drest = picture(kHeads * kBoth, keys);
  // One bias for each head, that learns; one for each picture, that hides some keys.
  const int64_t width = BiasWidth(queries), row = keys * width;
  std::vector<int32_t> of_head, of_picture;
  for (int32_t problem = 0; problem < problems; ++problem) {
    of_head.push_back(problem % kHeads);
    of_picture.push_back(problem / kHeads);
  }
  const Floats learned(kHeads * row), gradient(kHeads * row), hidden(pictures * row);
  std::uniform_real_distribution<float> value(-1.0f, 1.0f);
  for (int64_t i = 0; i < kHeads * row; ++i) learned.data[i] = value(random);
  for (int64_t i = 0; i < pictures * row; ++i)
    hidden.data[i] = i % 3 == 1 ? -std::numeric_limits<float>::infinity() : 0;
  const ScoreBias biases[2] = {{learned.data, of_head.data(), kHeads, gradient.data},
                               {hidden.data, of_picture.data(), pictures, nullptr}};
  const ProblemRuns runs = RunsOf(problems, of_head, PlacesIn(q.map.lanes, places[0]));
  Tensor factors(problems), factor_gradient(problems);
  for (float& factor : factors) factor = value(random) + 1.5f;
  const AttentionSpec spec = {problems,
                              kFeatures,
                              kOfValue,
                              queries,
                              keys,
                              kScale,
                              factors.data(),
                              factor_gradient.data(),
                              epsilon,
                              true,
                              biases,
                              2,
                              runs.order.data(),
                              runs.ends.data(),
                              static_cast<int64_t>(runs.ends.size()),
                              runs.together};
  // The place in a plain tensor of feature f of a token.
  const auto at = [&](const Picture& p, int which, int64_t problem, int64_t token, int64_t f) {
    const int64_t tokens = which == 1 || which == 2 ? keys : queries, plane = p.map.lanes.height * p.map.lanes.width;
    const int64_t pixel = places[which].pixels[problem * tokens + token];
    const int64_t channel = places[which].channels[problem] + f;
    return (pixel / plane * p.map.lanes.channels + channel) * plane + pixel % plane;
  };
  const AttentionKernels& kernels = Kernels<AttentionKernels>();
  const Floats scratch(kernels.floats(spec, true));
  std::vector<double> want(y.tensor.size()), dq_want(dq.tensor.begin(), dq.tensor.end());
  std::vector<double> drest_want(drest.tensor.begin(), drest.tensor.end()), dbias_want(kHeads * row);
  std::vector<double> dfactor_want(problems);
  for (int64_t n = 0; n < problems; ++n) {
    // What a token is divided by.
    const auto length = [&](const Picture& p, int which, int64_t token) {
      double sum = 0;
      for (int64_t f = 0; f < kFeatures; ++f) sum += std::pow(p.tensor[at(p, which, n, token, f)], 2);
      return epsilon < 0 ? 1.0 : std::max<double>(std::sqrt(sum), epsilon);
    };
    // A gradient of a token after its division, before.
    const auto before = [&](const Picture& p, int which, int64_t token, const std::vector<double>& gradient) {
      const double divided = length(p, which, token);
      double along = 0;
      for (int64_t f = 0; f < kFeatures; ++f) along += gradient[f] * p.tensor[at(p, which, n, token, f)] / divided;
      std::vector<double> found(gradient);
      for (int64_t f = 0; f < kFeatures; ++f) {
        if (epsilon >= 0 && divided > epsilon) found[f] -= along * p.tensor[at(p, which, n, token, f)] / divided;
        found[f] /= divided;
      }
      return found;
    };
    std::vector<std::vector<double>> dkeys(keys, std::vector<double>(kFeatures));
    for (int64_t i = 0; i < queries; ++i) {
      std::vector<double> cosines(keys), weights(keys), slopes(keys), dquery(kFeatures);
      const auto product = [&](const Picture& a, int of_a, int of_b, int64_t j) {
        double sum = 0;
        for (int64_t f = 0; f < (of_b == 1 ? kFeatures : kOfValue); ++f) {
          sum += static_cast<double>(a.tensor[at(a, of_a, n, i, f)]) * rest.tensor[at(rest, of_b, n, j, f)];
        }
        return sum;
      };
      const auto bias = [&](const float* scores, int64_t which, int64_t j) {
        return scores[which * row + j * width + i];
      };
      for (int64_t j = 0; j < keys; ++j) {
        const double added = bias(learned.data, of_head[n], j) + bias(hidden.data, of_picture[n], j);
        cosines[j] = product(q, 0, 1, j) / length(q, 0, i) / length(rest, 1, j);
        weights[j] = std::exp(kScale * factors[n] * cosines[j] + added);
      }
      const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
      double along = 0;
      for (int64_t j = 0; j < keys; ++j) {
        weights[j] = total > 0 ? weights[j] / total : 0;
        slopes[j] = product(dy, 3, 2, j);
        along += weights[j] * slopes[j];
      }
      for (int64_t j = 0; j < keys; ++j) {
        const double score = weights[j] * (slopes[j] - along);
        dbias_want[of_head[n] * row + j * width + i] += score;
        dfactor_want[n] += kScale * score * cosines[j];
        for (int64_t f = 0; f < kFeatures; ++f) {
          const double scaled = kScale * factors[n] * score;
          dquery[f] += scaled * rest.tensor[at(rest, 1, n, j, f)] / length(rest, 1, j);
          dkeys[j][f] += scaled * q.tensor[at(q, 0, n, i, f)] / length(q, 0, i);
        }
        for (int64_t f = 0; f < kOfValue; ++f) {
          const int64_t seen = at(y, 3, n, i, f), of_value = at(rest, 2, n, j, f);
          want[seen] += weights[j] * rest.tensor[of_value];
          drest_want[of_value] += weights[j] * dy.tensor[seen];
        }
      }
      dquery = before(q, 0, i, dquery);
      for (int64_t f = 0; f < kFeatures; ++f) dq_want[at(q, 0, n, i, f)] += dquery[f];
    }
    for (int64_t j = 0; j < keys; ++j) {
      const std::vector<double> dkey = before(rest, 1, j, dkeys[j]);
      for (int64_t f = 0; f < kFeatures; ++f) drest_want[at(rest, 1, n, j, f)] += dkey[f];
    }
  }
  std::vector<std::vector<int64_t>> lists;
  std::vector<Neighbours> neighbours;
  lists.reserve(7);
  neighbours.reserve(7);
  const auto heads = [&](const Picture& p, int which) {
    lists.push_back(PlacesIn(p.map.lanes, places[which]));
    neighbours.emplace_back(runs, lists.back());
    return HeadMap{p.map.lanes, lists.back().data(), neighbours.back().runs.data(), neighbours.back().steps.data()};
  };
  const HeadMap query = heads(q, 0), key = heads(rest, 1), value_map = heads(rest, 2);
  kernels.forward(query, key, value_map, heads(y, 3), spec, scratch.data, threads);
  Expect(Error(y.Read(), want) < kTolerance, name + " attention forward");
  const HeadMap dquery = heads(dq, 0), dkey = heads(drest, 1), dvalue = heads(drest, 2);
  kernels.backward(query, key, value_map, heads(dy, 3), &dquery, &dkey, &dvalue, spec, scratch.data, threads);
  Expect(Error(dq.Read(), dq_want) < kTolerance, name + " attention query gradient");
  Expect(Error(drest.Read(), drest_want) < kTolerance, name + " attention key and value gradients");
  for (int64_t i = 0; i < kHeads * row; ++i) {
    if (i % width < queries) Expect(std::abs(gradient.data[i] - dbias_want[i]) < kTolerance, name + " bias gradient");
  }
  Expect(Error(factor_gradient, dfactor_want) < kTolerance, name + " factor gradient");
}

void RunAttention(int threads, const std::string& name) {
  for (int64_t tokens : {1, 7, 33}) {
    for (int64_t grid : {1, 2, 4}) {
      for (float epsilon : {-1.0f, 0.0f, 1.3f}) {  // some tokens are shorter than the last
        const std::string full = name + " " + std::to_string(tokens) + " " + std::to_string(epsilon);
        RunAttentionOf(tokens, 34 - tokens, grid, epsilon, false, threads, full);
        if (grid == 4) RunAttentionOf(tokens, 34 - tokens, grid, epsilon, true, threads, full + " in lanes");
      }
    }
  }
}

// A factor of each plane, and its gradient.
void RunPlanes(const Picture& a, const Picture& b, Picture& y, std::mt19937& random, int threads,
               const std::string& name) {
  constexpr int64_t kPlane = kHeight * kWidth;
  Picture factor(kBatch, kChannels, 1, 1, 1, 1, 1, random), dots(kBatch, kChannels, 1, 1, 1, 1, 0, random);
  std::vector<double> want(a.tensor.size()), sums(kBatch * kChannels);
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] = static_cast<double>(a.tensor[i]) * factor.tensor[i / kPlane];
    sums[i / kPlane] += 2 * (a.tensor[i] + 3.0) * (b.tensor[i] + 3.0);
  }
  Kernels<PointwiseKernels>().multiply(a.map.lanes, factor.map.lanes, y.map.lanes, false, threads);
  Expect(Error(y.Read(), want) < kTolerance, name + " multiply planes");
  for (size_t i = 0; i < want.size(); ++i) want[i] = 2.0 * a.tensor[i] - 0.5 * factor.tensor[i / kPlane] + 3.0;
  Kernels<PointwiseKernels>().combine(a.map.lanes, 2.0f, &factor.map.lanes, -0.5f, 3.0f, y.map.lanes, threads);
  Expect(Error(y.Read(), want) < kTolerance, name + " combine planes");
  Picture first = MakePicture(random, 1), second = MakePicture(random, 0);  // dead pixels of theirs are not zero
  Kernels<PointwiseKernels>().combine(a.map.lanes, 1.0f, nullptr, 0.0f, 3.0f, first.map.lanes, threads);
  Kernels<PointwiseKernels>().combine(b.map.lanes, 1.0f, nullptr, 0.0f, 3.0f, second.map.lanes, threads);
  const LiveLanes live;
  for (bool accumulate : {false, true}) {
    Kernels<PointwiseKernels>().dot_planes(first.map.lanes, &second.map.lanes, dots.map.lanes, live.mask(), accumulate,
                                           threads);
  }
  Expect(Error(dots.Read(), sums) < kTolerance, name + " dot planes");
  std::fill(sums.begin(), sums.end(), 0.0);
  for (size_t i = 0; i < want.size(); ++i) sums[i / kPlane] += a.tensor[i] + 3.0;
  Kernels<PointwiseKernels>().dot_planes(first.map.lanes, nullptr, dots.map.lanes, live.mask(), false, threads);
  Expect(Error(dots.Read(), sums) < kTolerance, name + " sum planes");
  std::vector<double> totals(2);
  for (size_t i = 0; i < want.size(); ++i) totals[0] += (a.tensor[i] + 3.0) * (b.tensor[i] + 3.0);
  totals[1] = std::accumulate(sums.begin(), sums.end(), 0.0);
  Tensor total(2);
  const Floats partial(kBatch * kChannels);
  const LaneMap* factors[] = {&second.map.lanes, nullptr};
  for (int i : {0, 1}) {
    Kernels<PointwiseKernels>().total(first.map.lanes, factors[i], live.mask(), partial.data, &total[i], threads);
  }
  Expect(Error(total, totals) < kTolerance, name + " totals");
}

// Slopes of the channels, or one for all, and their gradients; dead pixels count nowhere.
// Channels as tokens, of two pictures with two heads each; keys and values lie in one map. With `epsilon` planes are
// divided by their norms, one of which is smaller.
void RunChannelAttentionOf(int64_t channels, float epsilon, int threads, const std::string& name) {
  std::mt19937 random(9);
  constexpr int64_t kHeads = 2, kProblems = kBatch * kHeads, kPlane = kHeight * kWidth;
  constexpr float kScale = 0.3f;
  const auto picture = [&](int64_t planes, int64_t halo) {
    return Picture(kBatch, planes, kHeight, kWidth, kBlockH, kBlockW, halo, random);
  };
  const int64_t first[4] = {1, 0, channels, 0}, apart[4] = {channels, 2 * channels, 2 * channels, channels};
  Picture q = picture(1 + kHeads * channels, 1), rest = picture(2 * kHeads * channels, 0);
  Picture y = picture(kHeads * channels, 1), dy = picture(kHeads * channels, 0);
  Picture dq = picture(1 + kHeads * channels, 0), drest = picture(2 * kHeads * channels, 1);
  for (int64_t i = 0; i < kPlane; ++i) q.tensor[kPlane + i] *= 0.01f;  // the first plane of the first head
  q.Write();
  const Floats factors(kProblems), gradient(kProblems);
  for (int64_t n = 0; n < kProblems; ++n) factors.data[n] = 0.5f + static_cast<float>(n);
  const LiveLanes live;
  for (const Picture* spoilt : {&q, &rest, &dy}) live.Spoil(*spoilt);
  const ChannelAttentionSpec spec = {kProblems, channels, kScale, factors.data, gradient.data, epsilon, live.mask()};
  const auto at = [&](const Picture& p, int which, int64_t problem, int64_t c) {
    const int64_t channel = first[which] + problem % kHeads * apart[which] + c;
    return (problem / kHeads * p.map.lanes.channels + channel) * kPlane;
  };
  const auto product = [](const Picture& a, int64_t of_a, const Picture& b, int64_t of_b) {
    return std::inner_product(a.tensor.begin() + of_a, a.tensor.begin() + of_a + kPlane, b.tensor.begin() + of_b, 0.0);
  };
  std::vector<double> want(y.tensor.size()), dq_want(dq.tensor.begin(), dq.tensor.end());
  std::vector<double> drest_want(drest.tensor.begin(), drest.tensor.end()), dfactor_want(kProblems);
  std::vector<double> dfactor_size(kProblems);
  const auto add = [&](std::vector<double>& to, int64_t place, double factor, const Picture& from, int64_t of) {
    for (int64_t i = 0; i < kPlane; ++i) to[place + i] += factor * from.tensor[of + i];
  };
  for (int64_t n = 0; n < kProblems; ++n) {
    const double scale = kScale * factors.data[n];
    const auto norm = [&](const Picture& p, int64_t place) {
      return epsilon < 0 ? 1.0 : std::max<double>(std::sqrt(product(p, place, p, place)), epsilon);
    };
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t of_query = at(q, 0, n, i), seen = at(y, 3, n, i);
      std::vector<double> cosines(channels), weights(channels), slopes(channels);
      double total = 0, along = 0;
      for (int64_t j = 0; j < channels; ++j) {
        const int64_t of_key = at(rest, 1, n, j);
        cosines[j] = product(q, of_query, rest, of_key) / norm(q, of_query) / norm(rest, of_key);
        total += weights[j] = std::exp(scale * cosines[j]);
        slopes[j] = product(dy, seen, rest, at(rest, 2, n, j));
      }
      for (int64_t j = 0; j < channels; ++j) along += (weights[j] /= total) * slopes[j];
      for (int64_t j = 0; j < channels; ++j) {
        const int64_t of_key = at(rest, 1, n, j), of_value = at(rest, 2, n, j);
        const double slope = weights[j] * (slopes[j] - along), of_cosine = scale * slope;
        const double query_norm = norm(q, of_query), key_norm = norm(rest, of_key);
        add(want, seen, weights[j], rest, of_value);
        add(drest_want, of_value, weights[j], dy, seen);
        add(dq_want, of_query, of_cosine / query_norm / key_norm, rest, of_key);
        add(drest_want, of_key, of_cosine / query_norm / key_norm, q, of_query);
        if (query_norm > epsilon && epsilon >= 0) {
          add(dq_want, of_query, -of_cosine * cosines[j] / query_norm / query_norm, q, of_query);
        }
        if (epsilon >= 0) add(drest_want, of_key, -of_cosine * cosines[j] / key_norm / key_norm, rest, of_key);
        dfactor_want[n] += kScale * slope * cosines[j];
        dfactor_size[n] += std::abs(kScale * weights[j] * cosines[j]) * (std::abs(slopes[j]) + std::abs(along));
      }
    }
  }
  std::vector<std::vector<int64_t>> lists;
  lists.reserve(7);
  const auto heads = [&](const Picture& p, int which) {
    const LaneMap& m = p.map.lanes;
    std::vector<int64_t>& places = lists.emplace_back();
    for (int64_t n = 0; n < kProblems; ++n) {
      places.push_back(n / kHeads * m.batch_stride + (first[which] + n % kHeads * apart[which]) * m.channel_stride);
    }
    return ChannelHeads{m, places.data()};
  };
  const ChannelAttentionKernels& kernels = Kernels<ChannelAttentionKernels>();
  const Floats scratch(kernels.floats(spec, true));
  const ChannelHeads query = heads(q, 0), key = heads(rest, 1), value = heads(rest, 2);
  kernels.forward(query, key, value, heads(y, 3), spec, scratch.data, threads);
  Expect(Error(y.Read(), want) < kTolerance, name + " forward");
  const ChannelHeads dquery = heads(dq, 0), dkey = heads(drest, 1), dvalue = heads(drest, 2);
  kernels.backward(query, key, value, heads(dy, 3), &dquery, &dkey, &dvalue, spec, scratch.data, threads);
  Expect(Error(dq.Read(), dq_want) < kTolerance, name + " query gradient");
  Expect(Error(drest.Read(), drest_want) < kTolerance, name + " key and value gradients");
  for (int64_t n = 0; n < kProblems; ++n) {
    Expect(std::abs(gradient.data[n] - dfactor_want[n]) < kTolerance * dfactor_size[n], name + " factor gradient");
  }
}

void RunChannelAttention(int threads, const std::string& name) {
  for (const int64_t channels : {1, 3, 21}) {
    for (const float epsilon : {-1.0f, 0.5f}) {
      const std::string what = name + " attention of " + std::to_string(channels) + " channels";
      RunChannelAttentionOf(channels, epsilon, threads, what + (epsilon < 0 ? "" : " over norms"));
    }
  }
}

void RunPrelu(int threads, const std::string& name) {
  std::mt19937 random(11);
  const LiveLanes live;
  const PreluKernels& kernels = Kernels<PreluKernels>();
  for (int64_t step : {0, 1}) {
    for (bool accumulate : {false, true}) {
      Picture x = MakePicture(random, 1), y = MakePicture(random, 0), dy = MakePicture(random, 1);
      Picture dx = MakePicture(random, 0);
      const LaneMap& m = x.map.lanes;
      Kernels<PointwiseKernels>().combine(m, 1.0f, nullptr, 0.0f, -0.5f, m, threads);  // and dead pixels, too
      Kernels<PointwiseKernels>().combine(dy.map.lanes, 1.0f, nullptr, 0.0f, 2.0f, dy.map.lanes, threads);
      const Tensor in = x.Read(), gradient = dy.Read(), slopes = Draw(step ? kChannels : 1, random), before = dx.tensor;
      std::vector<double> want(in.size()), dx_want(in.size()), dslopes_want(slopes.size());
      for (size_t i = 0; i < in.size(); ++i) {
        const int64_t at = ChannelOf(i) * step;
        const bool above = in[i] > 0;
        want[i] = above ? in[i] : slopes[at] * in[i];
        dx_want[i] = gradient[i] * (above ? 1.0 : slopes[at]) + (accumulate ? before[i] : 0.0);
        if (!above) dslopes_want[at] += gradient[i] * in[i];
      }
      const PreluSpec spec = {slopes.data(), step};
      const std::string what = name + (step ? " prelu" : " prelu with one slope");
      kernels.forward(m, y.map.lanes, spec, threads);
      Expect(Error(y.Read(), want) < kTolerance, what);
      Tensor dslopes(slopes.size());
      const Floats partial(kBatch * kChannels);
      Picture& result = accumulate ? dx : dy;  // the other case overwrites what it reads
      kernels.backward(m, dy.map.lanes, nullptr, spec, live.mask(), false, dslopes.data(), partial.data, threads);
      Expect(Error(dslopes, dslopes_want) < kTolerance, what + ", the slopes' gradient alone");
      kernels.backward(m, dy.map.lanes, &result.map.lanes, spec, live.mask(), accumulate, dslopes.data(), partial.data,
                       threads);
      Expect(Error(result.Read(), dx_want) < kTolerance, what + " backward");
      Expect(Error(dslopes, dslopes_want) < kTolerance, what + ", the slopes' gradient");
    }
  }
}

// Maps of one channel: beside maps of several, and made from such, with more channels than are summed up at once.
void RunChannels(int threads, const std::string& name) {
  std::mt19937 random(12);
  constexpr int64_t kMany = 70, kPlane = kHeight * kWidth;
  const auto picture = [&](int64_t channels) {
    return Picture(kBatch, channels, kHeight, kWidth, kBlockH, 5, 1, random);  // a piece of a row, and one vector
  };
  Picture a = picture(kMany), b = picture(kMany), y = picture(kMany), one = picture(1), sums = picture(1);
  for (float& number : a.tensor) number = std::round(2 * number);  // many equal ones
  a.Write();
  const auto pixel = [](int64_t i) { return i / (kMany * kPlane) * kPlane + i % kPlane; };
  std::vector<double> product(a.tensor.size()), sum(product.size()), dots(one.tensor.size()),
      largest(dots.size(), -1e9);
  for (size_t i = 0; i < product.size(); ++i) {
    product[i] = static_cast<double>(a.tensor[i]) * one.tensor[pixel(i)];
    sum[i] = 2.0 * a.tensor[i] - 0.5 * one.tensor[pixel(i)] + 3.0;
    dots[pixel(i)] += 2 * 0.25 * a.tensor[i] * b.tensor[i];
    largest[pixel(i)] = std::max(largest[pixel(i)], static_cast<double>(a.tensor[i]));
  }
  const PointwiseKernels& pointwise = Kernels<PointwiseKernels>();
  pointwise.multiply(a.map.lanes, one.map.lanes, y.map.lanes, false, threads);
  Expect(Error(y.Read(), product) < kTolerance, name + " multiply by a channel");
  pointwise.combine(a.map.lanes, 2.0f, &one.map.lanes, -0.5f, 3.0f, y.map.lanes, threads);
  Expect(Error(y.Read(), sum) < kTolerance, name + " combine with a channel");
  const ChannelKernels& kernels = Kernels<ChannelKernels>();
  for (bool accumulate : {false, true}) {
    kernels.dot(a.map.lanes, &b.map.lanes, 0.25f, sums.map.lanes, accumulate, threads);
  }
  Expect(Error(sums.Read(), dots) < kTolerance, name + " dot of channels");
  std::fill(dots.begin(), dots.end(), 0.0);
  for (size_t i = 0; i < product.size(); ++i) dots[pixel(i)] += a.tensor[i];
  kernels.dot(a.map.lanes, nullptr, 1.0f, sums.map.lanes, false, threads);
  Expect(Error(sums.Read(), dots) < kTolerance, name + " sum of channels");
  kernels.largest(a.map.lanes, sums.map.lanes, threads);
  Expect(Error(sums.Read(), largest) == 0, name + " largest channel");
  for (bool shared : {false, true}) {
    std::vector<double> left(one.tensor.begin(), one.tensor.end()), equal(left.size()), change(product.size());
    for (size_t i = 0; i < change.size(); ++i) equal[pixel(i)] += a.tensor[i] == largest[pixel(i)];
    for (size_t i = 0; i < change.size(); ++i) {
      if (a.tensor[i] != largest[pixel(i)]) continue;
      change[i] = shared ? left[pixel(i)] / equal[pixel(i)] : left[pixel(i)];
      if (!shared) left[pixel(i)] = 0;
    }
    for (bool accumulate : {false, true}) {
      kernels.largest_backward(a.map.lanes, one.map.lanes, y.map.lanes, shared, accumulate, threads);
      const std::string what = name + (shared ? " largest channels" : " first largest channel") + " backward";
      Expect(Error(y.Read(), change) < kTolerance, what + (accumulate ? ", added" : ""));
      for (double& number : change) number *= 2;
    }
  }
}

// Of pictures that share lanes, some of them missing.
void RunResponseNorm(int threads, const std::string& name) {
  for (int64_t grid : {1, 2, 4}) {
    std::mt19937 random(13);
    const int64_t batch = 32 / (grid * grid) - 1, block = 16 / grid, planes = batch * kChannels;
    const auto picture = [&](int64_t height, int64_t width, int64_t side, int64_t halo) {
      return Picture(batch, kChannels, height, width, side, side, halo, random, grid);
    };
    Picture x = picture(kHeight, kWidth, block, 1), dx = picture(kHeight, kWidth, block, 0);
    Picture y = picture(1, 1, 1, 0), dy = picture(1, 1, 1, 1);
    const int64_t plane = kHeight * kWidth;
    std::fill_n(x.tensor.begin() + plane, plane, 0.0f);  // a channel of zeros
    x.Write();
    std::vector<double> size(planes), want(planes), factor(planes), dx_want(dx.tensor.begin(), dx.tensor.end());
    for (size_t i = 0; i < x.tensor.size(); ++i) size[i / plane] += std::pow(x.tensor[i], 2);
    for (int64_t first = 0; first < planes; first += kChannels) {
      double mean = 1e-3, along = 0;
      for (int64_t c = first; c < first + kChannels; ++c) size[c] = std::sqrt(size[c]), mean += size[c] / kChannels;
      for (int64_t c = first; c < first + kChannels; ++c) along += dy.tensor[c] * size[c] / mean / kChannels;
      for (int64_t c = first; c < first + kChannels; ++c) {
        want[c] = size[c] / mean;
        factor[c] = size[c] > 0 ? (dy.tensor[c] - along) / mean / size[c] : 0.0;
      }
    }
    for (size_t i = 0; i < dx_want.size(); ++i) dx_want[i] += x.tensor[i] * factor[i / plane];
    Floats rows(block * 16), columns(block * 16);
    for (int64_t lane = 0; lane < 16; ++lane) {
      const LanePlace& place = PlaceOf(lane, grid);
      for (int64_t i = 0; i < block; ++i) {
        rows.data[i * 16 + lane] = place.row * block + i < kHeight;
        columns.data[i * 16 + lane] = place.col * block + i < kWidth;
      }
    }
    const LivePixelMask live = {rows.data, columns.data};
    const Floats partial(x.map.lanes.batch * kChannels * 16);
    const ResponseNormKernels& kernels = Kernels<ResponseNormKernels>();
    const std::string what = name + " response norm, grid " + std::to_string(grid);
    kernels.forward(x.map.lanes, y.map.lanes, 1e-3f, live, threads);
    Expect(Error(y.Read(), want) < kTolerance, what);
    kernels.backward(x.map.lanes, dy.map.lanes, dx.map.lanes, 1e-3f, live, true, partial.data, threads);
    Expect(Error(dx.Read(), dx_want) < kTolerance, what + " backward");
  }
}

void RunPointwise(int threads, const std::string& name) {
  std::mt19937 random(4);
  for (int number = 0; number <= static_cast<int>(kLastActivation); ++number) {
    const Activation kind = static_cast<Activation>(number);
    Picture x = MakePicture(random, 0), y = MakePicture(random, 1), dy = MakePicture(random, 2);
    const ActivationSpec act = {kind, 0.3f};
    const auto value = [&](double z) {
      const double sigmoid = 1 / (1 + std::exp(-z)), hard = std::clamp(z + 3, 0.0, 6.0) / 6;
      return kind == Activation::kRelu          ? std::max(z, 0.0)
             : kind == Activation::kLeaky       ? (z > 0 ? z : 0.3 * z)
             : kind == Activation::kSigmoid     ? sigmoid
             : kind == Activation::kTanh        ? std::tanh(z)
             : kind == Activation::kSilu        ? z * sigmoid
             : kind == Activation::kRelu6       ? std::clamp(z, 0.0, 6.0)
             : kind == Activation::kHardsigmoid ? hard
             : kind == Activation::kHardswish   ? z * hard
             : kind == Activation::kGelu        ? z * std::erfc(-z / std::sqrt(2.0)) / 2
             : kind == Activation::kGeluTanh    ? z * (1 + std::tanh(0.7978845608 * (z + 0.044715 * z * z * z))) / 2
                                                : z;
    };
    const std::string what = name + " activation " + std::to_string(number);
    x.Scale(4);  // beyond the bounds of the bounded ones
    const Tensor in = x.tensor, gradient = dy.tensor;
    std::vector<double> want(in.size()), slope(in.size());
    for (size_t i = 0; i < in.size(); ++i) {
      want[i] = value(in[i]);
      slope[i] = gradient[i] * (value(in[i] + 1e-5) - value(in[i] - 1e-5)) / 2e-5;
    }
    const PointwiseKernels& kernels = Kernels<PointwiseKernels>();
    kernels.activate(x.map.lanes, y.map.lanes, act, threads);
    Expect(Error(y.Read(), want) < kTolerance, what);
    kernels.activate_backward(x.map.lanes, dy.map.lanes, y.map.lanes, act, false, threads);
    Expect(Error(y.Read(), slope) < 1e-4, what + " backward");
  }
  Picture a = MakePicture(random, 0), b = MakePicture(random, 1), y = MakePicture(random, 0);
  std::vector<double> want(a.tensor.size());
  for (size_t i = 0; i < want.size(); ++i) want[i] = 2.0 * a.tensor[i] - 0.5 * b.tensor[i] + 3.0;
  Kernels<PointwiseKernels>().combine(a.map.lanes, 2.0f, &b.map.lanes, -0.5f, 3.0f, y.map.lanes, threads);
  Expect(Error(y.Read(), want) < kTolerance, name + " combine");
  for (size_t i = 0; i < want.size(); ++i) want[i] = 2.0 * a.tensor[i] * b.tensor[i];
  Kernels<PointwiseKernels>().multiply(a.map.lanes, b.map.lanes, y.map.lanes, false, threads);
  Kernels<PointwiseKernels>().multiply(b.map.lanes, a.map.lanes, y.map.lanes, true, threads);
  Expect(Error(y.Read(), want) < kTolerance, name + " multiply");
  RunPlanes(a, b, y, random, threads, name);
  std::vector<double> squares(kBatch * kHeight * kWidth);
  const auto pixel = [&](size_t i) {
    return i / (kChannels * kHeight * kWidth) * kHeight * kWidth + i % (kHeight * kWidth);
  };
  for (size_t i = 0; i < want.size(); ++i) squares[pixel(i)] += std::pow(a.tensor[i], 2) / kChannels;
  for (size_t i = 0; i < want.size(); ++i) want[i] = a.tensor[i] / std::sqrt(squares[pixel(i)] + 1e-8);
  Kernels<PointwiseKernels>().pixel_norm(a.map.lanes, y.map.lanes, 1e-8f, threads);
  Expect(Error(y.Read(), want) < kTolerance, name + " pixel norm");
}

void RunFinish(int threads, const std::string& name) {
  std::mt19937 random(5);
  Picture x = MakePicture(random, 0), residual = MakePicture(random, 1), y = MakePicture(random, 1);
  Tensor gamma = Draw(kChannels, random), beta = Draw(kChannels, random), mean = Draw(kChannels, random);
  const Tensor variance(kChannels, 0.7f);
  const NormNumbers norm = {gamma.data(), beta.data(), mean.data(), variance.data(), 1e-5f};
  std::vector<double> want(x.tensor.size());
  for (size_t i = 0; i < want.size(); ++i) {
    const int64_t c = ChannelOf(i);
    const double z = gamma[c] * (x.tensor[i] - mean[c]) / std::sqrt(0.7 + 1e-5) + beta[c] + residual.tensor[i];
    want[i] = std::max(z, 0.0);
  }
  Picture factor = MakePicture(random, 0);
  const auto finish = [&](const LaneMap* times) {
    Kernels<FinishKernels>().finish(x.map.lanes, &residual.map.lanes, times, y.map.lanes, norm,
                                    {Activation::kRelu, 0.0f}, {true, Padding::kZero, 1}, threads);
  };
  finish(nullptr);
  Expect(Error(y.Read(), want) < kTolerance, name + " finish");
  finish(&factor.map.lanes);
  for (size_t i = 0; i < want.size(); ++i) want[i] *= factor.tensor[i];
  Expect(Error(y.Read(), want) < kTolerance, name + " finish with a factor");
  const NormNumbers one_for_all = {gamma.data(), beta.data(), nullptr, nullptr, 0.0f, 0, 0};
  for (size_t i = 0; i < want.size(); ++i) want[i] = gamma[0] * x.tensor[i] + beta[0];
  Kernels<FinishKernels>().finish(x.map.lanes, nullptr, nullptr, y.map.lanes, one_for_all, {}, {}, threads);
  Expect(Error(y.Read(), want) < kTolerance, name + " finish with one number for all channels");
}

// Windows on pictures of a batch that fills its sheets.
struct Pooling {
  int64_t kernel, stride, pad, height, grid;
  bool counts_padding = true, rounds_up = false;

  int64_t Windows(int64_t side) const { return (side + 2 * pad - kernel + (rounds_up ? stride - 1 : 0)) / stride + 1; }
};

void RunPooling(const Pooling& c, bool maximum, int threads, const std::string& name) {
  std::mt19937 random(6);
  const int64_t batch = 32 / (c.grid * c.grid), height = c.height, block_h = 2 * ((height + 1) / (2 * c.grid) + 1);
  const int64_t block_w = 2 * (kWidth / (2 * c.grid) + 1);
  const int64_t out_h = c.Windows(height), out_w = c.Windows(kWidth);
  Picture x(batch, kChannels, height, kWidth, block_h, block_w, 1, random, c.grid),
      dx(batch, kChannels, height, kWidth, block_h, block_w, 0, random, c.grid);
  Picture y(batch, kChannels, out_h, out_w, block_h / 2, block_w / 2, 1, random, c.grid),
      dy(batch, kChannels, out_h, out_w, block_h / 2, block_w / 2, 0, random, c.grid);
  for (size_t i = 0; i < x.tensor.size(); i += 3) x.tensor[i] = 1.0f;  // equal ones
  x.Write();
  const int64_t counted = c.counts_padding ? c.pad : 0;
  const PoolSpec spec = {c.kernel, c.stride, c.pad, counted, maximum};
  const int64_t places = c.kernel * c.kernel;
  std::vector<double> want(y.tensor.size()), dx_want(dx.tensor.begin(), dx.tensor.end());
  for (size_t i = 0; i < want.size(); ++i) {
    const int64_t plane = i / (out_h * out_w), row = i / out_w % out_h, col = i % out_w;
    int64_t best = -1, count = 0;
    const auto at_row = [&](int64_t k) { return c.stride * row + k / c.kernel - c.pad; };
    const auto at_col = [&](int64_t k) { return c.stride * col + k % c.kernel - c.pad; };
    const auto counts = [&](int64_t at, int64_t side) { return at >= -counted && at < side + counted; };
    for (int64_t k = 0; k < places; ++k) count += counts(at_row(k), height) && counts(at_col(k), kWidth);
    for (int64_t k = 0; k < places; ++k) {
      const int64_t r = at_row(k), q = at_col(k);
      if (r < 0 || q < 0 || r >= height || q >= kWidth) continue;
      const int64_t at = plane * height * kWidth + r * kWidth + q;
      const double share = 1.0 / static_cast<double>(count);
      if (!maximum) want[i] += x.tensor[at] * share, dx_want[at] += dy.tensor[i] * share;
      if (best < 0 || x.tensor[at] > x.tensor[best]) best = at;
    }
    if (maximum) want[i] = x.tensor[best], dx_want[best] += dy.tensor[i];
  }
  Kernels<LaneKernels>().fill_halo(x.map.lanes, maximum ? Padding::kReplicate : Padding::kZero, 1, threads);
  const PoolKernels& kernels = Kernels<PoolKernels>();
  kernels.forward(x.map.lanes, y.map.lanes, spec, {true, Padding::kZero, 0}, threads);
  kernels.backward(x.map.lanes, dy.map.lanes, dx.map.lanes, spec, threads);
  Expect(Error(y.Read(), want) < kTolerance, name);
  const Floats& floats = y.map.floats;
  const std::vector<float> with_halo(floats.data, floats.data + floats.size);
  Kernels<LaneKernels>().fill_halo(y.map.lanes, Padding::kZero, 0, threads);
  Expect(std::equal(with_halo.begin(), with_halo.end(), floats.data), name + " with its halo");
  Expect(Error(dx.Read(), dx_want) < kTolerance, name + " backward");
}

// Windows whose sides differ, of pixels that others take, too.
void RunMeanTo(int64_t grid, int threads, const std::string& name) {
  std::mt19937 random(8);
  constexpr int64_t kRows = 4, kColumns = 5;
  const int64_t batch = 32 / (grid * grid) - 1, block = 16 / grid;
  Picture x(batch, kChannels, kHeight, kWidth, block, block, 0, random, grid);
  Picture dx(batch, kChannels, kHeight, kWidth, block, block, 1, random, grid);
  Picture y(batch, kChannels, kRows, kColumns, 8 / grid, 8 / grid, 0, random, grid);
  const Tensor dy = y.tensor;
  std::vector<double> want(dy.size()), dx_want(dx.tensor.begin(), dx.tensor.end());
  const auto first = [](int64_t i, int64_t from, int64_t to) { return i * from / to; };
  const auto last = [](int64_t i, int64_t from, int64_t to) { return ((i + 1) * from + to - 1) / to; };
  for (int64_t i = 0; i < static_cast<int64_t>(want.size()); ++i) {
    const int64_t plane = i / (kRows * kColumns), row = i / kColumns % kRows, col = i % kColumns;
    const int64_t top = first(row, kHeight, kRows), bottom = last(row, kHeight, kRows);
    const int64_t left = first(col, kWidth, kColumns), right = last(col, kWidth, kColumns);
    const double share = 1.0 / static_cast<double>((bottom - top) * (right - left));
    for (int64_t r = top; r < bottom; ++r) {
      for (int64_t q = left; q < right; ++q) {
        const int64_t at = (plane * kHeight + r) * kWidth + q;
        want[i] += x.tensor[at] * share;
        dx_want[at] += dy[i] * share;
      }
    }
  }
  Kernels<PoolKernels>().mean_to_backward(y.map.lanes, dx.map.lanes, threads);
  Kernels<PoolKernels>().mean_to(x.map.lanes, y.map.lanes, threads);
  Expect(Error(y.Read(), want) < kTolerance, name);
  Expect(Error(dx.Read(), dx_want) < kTolerance, name + " backward");
}

void RunPool(int threads, const std::string& name) {
  for (int64_t grid : {1, 2, 4}) {
    // Windows that overlap; that lie apart; that leave a row out; that count no padding; that reach beyond the picture.
    for (const Pooling& c : {Pooling{3, 2, 1, 9, grid},
                             {2, 2, 0, 8, grid},
                             {2, 2, 0, 9, grid},
                             {3, 2, 1, 9, grid, false},
                             {3, 2, 0, 8, grid, true, true},
                             {2, 2, 0, 9, grid, false, true}}) {
      for (bool maximum : {false, true}) {
        RunPooling(c, maximum, threads,
                   name + (maximum ? " maximum of " : " average of ") + std::to_string(c.kernel) + " on " +
                       std::to_string(c.height) + " rows, grid " + std::to_string(grid));
      }
    }
    RunMeanTo(grid, threads, name + " means, grid " + std::to_string(grid));
  }
}

// One picture of a batch after the other, whatever lanes they share.
void RunSheets(int threads, const std::string& name) {
  const LaneKernels& lanes = Kernels<LaneKernels>();
  for (int64_t grid : {1, 2}) {
    for (Padding mode : {Padding::kZero, Padding::kReflect, Padding::kReplicate, Padding::kCircular}) {
      const std::string what =
          name + " sheets, grid " + std::to_string(grid) + ", padding " + std::to_string(static_cast<int>(mode));
      std::mt19937 random(3);
      const int64_t missing = mode == Padding::kReflect || mode == Padding::kZero ? 3 : 0;
      const int64_t batch = 32 / (grid * grid) - missing, side = 8 / grid, halo = 2;
      Picture x(batch, 3, 7, 6, side, side, halo, random, grid), y(batch, 3, 7, 6, side + 1, side, 0, random, grid);
      const Tensor before = x.tensor;
      Expect(x.Read() == before, what + " there and back");
      lanes.reblock(x.map.lanes, y.map.lanes, threads);
      Expect(y.Read() == before, what + " in other blocks");
      Picture z(batch, 3, 7, 6, side, side, 1, random, grid);
      lanes.reblock(x.map.lanes, z.map.lanes, threads);
      Expect(z.Read() == before, what + " in equal blocks with another halo");
      lanes.fill_halo(x.map.lanes, mode, halo, threads);
      const LaneMap& m = x.map.lanes;
      bool right = true;
      for (int64_t i = 0; i < 16 * m.batch * m.channels; ++i) {
        const LanePlace& place = PlaceOf(i % 16, grid);
        const int64_t plane = i / 16, n = plane / m.channels, c = plane % m.channels;
        const int64_t picture = n * m.sheet() + place.picture;
        for (int64_t row = -halo; row < side + halo; ++row) {
          for (int64_t col = -halo; col < side + halo; ++col) {
            int64_t r = place.row * side + row, q = place.col * side + col;
            if (r < 0 || r >= 7) r = PaddingSource(r, 7, mode, halo);
            if (q < 0 || q >= 6) q = PaddingSource(q, 6, mode, halo);
            const float want =
                r < 0 || q < 0 || picture >= batch ? 0.0f : before[((picture * m.channels + c) * 7 + r) * 6 + q];
            right = right && m.At(n, c, row, col)[i % 16] == want;
          }
        }
      }
      Expect(right, what + " halo");
    }
  }
}

void RunResample(int threads, const std::string& name) {
  std::mt19937 random(8);
  const int64_t side = 8;  // whole blocks: what x2 upsampling is planned for
  for (bool bilinear : {false, true}) {
    Picture x(1, 3, side, side, 2, 2, 1, random), y(1, 3, 2 * side, 2 * side, 4, 4, 1, random);
    const auto at = [&](int64_t i) { return std::clamp<int64_t>(i, 0, side - 1); };
    std::vector<double> want(y.tensor.size());
    for (size_t i = 0; i < want.size(); ++i) {
      const int64_t plane = i / (4 * side * side), row = i / (2 * side) % (2 * side), col = i % (2 * side);
      const auto pixel = [&](int64_t r, int64_t c) { return x.tensor[(plane * side + at(r)) * side + at(c)]; };
      const int64_t r = row / 2, c = col / 2, down = row % 2 ? 1 : -1, right = col % 2 ? 1 : -1;
      want[i] = bilinear ? 0.5625 * pixel(r, c) + 0.1875 * (pixel(r + down, c) + pixel(r, c + right)) +
                               0.0625 * pixel(r + down, c + right)
                         : pixel(r, c);
    }
    Kernels<LaneKernels>().fill_halo(x.map.lanes, Padding::kReplicate, 1, threads);
    const ResampleKernels& kernels = Kernels<ResampleKernels>();
    (bilinear ? kernels.bilinear2 : kernels.nearest2)(x.map.lanes, y.map.lanes, threads);
    const std::string what = name + (bilinear ? " bilinear" : " nearest");
    Expect(Error(y.Read(), want) < kTolerance, what);
    // The transposed map: <up(x), g> = <x, up^T(g)>.
    Picture g(1, 3, 2 * side, 2 * side, 4, 4, 1, random), dx(1, 3, side, side, 2, 2, 0, random);
    double forward = 0, backward = 0;
    for (size_t i = 0; i < want.size(); ++i) forward += want[i] * g.tensor[i];
    Kernels<LaneKernels>().fill_halo(g.map.lanes, Padding::kReplicate, 1, threads);
    (bilinear ? kernels.bilinear2_backward : kernels.nearest2_backward)(g.map.lanes, dx.map.lanes, false, threads);
    const Tensor read = dx.Read();
    for (size_t i = 0; i < read.size(); ++i) backward += static_cast<double>(read[i]) * x.tensor[i];
    Expect(std::abs(forward - backward) < 1e-3, what + " backward");
  }
  for (int64_t r : {2, 3}) {
    Picture many(1, r * r, side, side, 2, 2, 1, random), large(1, 1, r * side, r * side, 2 * r, 2 * r, 0, random);
    std::vector<double> shuffled(large.tensor.size()), twice(many.tensor.size());
    for (int64_t i = 0; i < static_cast<int64_t>(shuffled.size()); ++i) {
      const int64_t row = i / (r * side), col = i % (r * side), channel = row % r * r + col % r;
      shuffled[i] = many.tensor[(channel * side + row / r) * side + col / r];
    }
    for (size_t i = 0; i < twice.size(); ++i) twice[i] = 2 * many.tensor[i];
    Kernels<ResampleKernels>().shuffle(many.map.lanes, large.map.lanes, true, false, threads);
    Expect(Error(large.Read(), shuffled) == 0, name + " shuffle");
    Kernels<ResampleKernels>().shuffle(many.map.lanes, large.map.lanes, false, true, threads);
    Expect(Error(many.Read(), twice) == 0, name + " unshuffle");
  }
  // Flipped columns, and rows of which one is nothing: any selection.
  Picture x = MakePicture(random, 0), y = MakePicture(random, 0), dx = MakePicture(random, 0);
  std::vector<int32_t> rows(kHeight), columns(kWidth);
  for (int64_t r = 0; r < kHeight; ++r) rows[r] = r == 4 ? -1 : static_cast<int32_t>(r);
  for (int64_t c = 0; c < kWidth; ++c) columns[c] = static_cast<int32_t>(kWidth - 1 - c);
  const AxisTaps down = {kHeight, rows.data(), nullptr, nullptr}, across = {kWidth, columns.data(), nullptr, nullptr};
  const ResampleKernels& kernels = Kernels<ResampleKernels>();
  kernels.general(x.map.lanes, y.map.lanes, down, across, threads);
  std::vector<double> want(x.tensor.size()), dx_want(dx.tensor.begin(), dx.tensor.end());
  for (size_t i = 0; i < want.size(); ++i) {
    const size_t from = i - i % kWidth + kWidth - 1 - i % kWidth;
    if (i / kWidth % kHeight == 4) continue;
    want[i] = x.tensor[from];
    dx_want[from] += x.tensor[i];
  }
  Expect(Error(y.Read(), want) < kTolerance, name + " selection");
  kernels.general_backward(x.map.lanes, dx.map.lanes, down, across, threads);
  Expect(Error(dx.Read(), dx_want) < kTolerance, name + " selection backward");
}

void RunPruning(int threads, const std::string& name) {
  std::mt19937 random(9);
  const std::vector<int64_t> sizes = {1, 15, 1000, 40000};
  std::vector<Tensor> scores, starts, dense;
  std::vector<std::vector<uint8_t>> alive, masks, bits;
  std::vector<WeightPart> parts;
  std::vector<PrunedPart> to;
  for (int64_t n : sizes) {
    scores.push_back(Draw(n, random)), starts.push_back(Draw(n, random)), dense.emplace_back(n);
    alive.emplace_back(n), masks.emplace_back(n), bits.emplace_back((n + 7) / 8);
    for (uint8_t& a : alive.back()) a = random() % 4 != 0;
  }
  struct Weight {
    float magnitude;
    size_t part, at;
  };
  std::vector<Weight> living;
  for (size_t p = 0; p < sizes.size(); ++p) {
    parts.push_back({scores[p].data(), alive[p].data(), sizes[p]});
    to.push_back({starts[p].data(), masks[p].data(), bits[p].data(), dense[p].data()});
    for (size_t i = 0; i < scores[p].size(); ++i) {
      if (alive[p][i]) living.push_back({std::abs(scores[p][i]), p, i});
    }
  }
  const int64_t count = static_cast<int64_t>(living.size()) / 3;
  std::stable_sort(living.begin(), living.end(),
                   [](const Weight& a, const Weight& b) { return a.magnitude < b.magnitude; });
  std::vector<std::vector<uint8_t>> want = alive;
  for (int64_t i = 0; i < count; ++i) want[living[i].part][living[i].at] = 0;
  Pruning pruning(parts, count, threads);
  Expect(pruning.valid() && pruning.survivors() == static_cast<int64_t>(living.size()) - count, name + " survivors");
  Tensor values(pruning.survivors());
  pruning.Write(to, values.data(), threads);
  bool right = true;
  size_t next = 0;
  for (size_t p = 0; p < sizes.size(); ++p) {
    for (size_t i = 0; i < masks[p].size(); ++i) {
      const bool kept = want[p][i];
      right = right && masks[p][i] == kept && (bits[p][i / 8] >> i % 8 & 1) == kept;
      right = right && dense[p][i] == (kept ? starts[p][i] : 0.0f) && (!kept || values[next++] == starts[p][i]);
    }
  }
  Expect(right && next == values.size(), name + " pruned weights");
  Tensor gathered(CountOnes(masks[3].data(), sizes[3], threads)), scattered(sizes[3]);
  Gather(starts[3].data(), masks[3].data(), sizes[3], gathered.data(), threads);
  Scatter(gathered.data(), masks[3].data(), sizes[3], scattered.data(), threads);
  Expect(scattered == dense[3], name + " gather and scatter");
}

void RunSteps(int threads, const std::string& name) {
  std::mt19937 random(10);
  const int64_t n = 1037;
  Tensor values = Draw(n, random), gradient = Draw(n, random), m(n), v(n), other = values, momentum(n);
  std::vector<double> want(values.begin(), values.end()), sgd_want = want, first(n), second(n), buffer(n);
  for (int64_t step = 1; step <= 3; ++step) {
    Kernels<StepKernels>().adam({1.0, 0.9, 0.999, 1e-8, 0.1}, step, values.data(), gradient.data(), m.data(), v.data(),
                                n, threads);
    Kernels<StepKernels>().sgd({0.5, 0.9, 0.0, 0.1, true}, step, other.data(), gradient.data(), momentum.data(), n,
                               threads);
    for (int64_t i = 0; i < n; ++i) {
      const double g = gradient[i] + 0.1 * want[i], h = gradient[i] + 0.1 * sgd_want[i];
      first[i] = 0.9 * first[i] + 0.1 * g;
      second[i] = 0.999 * second[i] + 0.001 * g * g;
      want[i] -= first[i] / (1 - std::pow(0.9, step)) / (std::sqrt(second[i] / (1 - std::pow(0.999, step))) + 1e-8);
      buffer[i] = step == 1 ? h : 0.9 * buffer[i] + h;
      sgd_want[i] -= 0.5 * (h + 0.9 * buffer[i]);
    }
  }
  Expect(Error(values, want) < kTolerance, name + " Adam");
  Expect(Error(other, sgd_want) < kTolerance, name + " SGD");
}

}  // namespace

// The first numbers of a draw, as the reference in Python has them, in memory of exactly its size.
void RunNoise(int threads, const std::string& name) {
  std::vector<float> base(77, 1.0f), noisy(77);
  Kernels<NoiseKernels>().add_noise(base.data(), 77, 2.0f, 12345678901234, 7, noisy.data(), threads);
  const std::vector<double> want = {1 + 2 * 0.39740881, 1 + 2 * 0.16797087};
  Expect(Error({noisy[0], noisy[16]}, want) < kTolerance, name + " noise");
}

void RunPasses(int threads, const std::string& name) {
  for (const auto& run :
       {RunNorm, RunGroupNorm, RunLayerNorm, RunAttention, RunChannelAttention, RunPrelu, RunChannels, RunResponseNorm,
        RunPointwise, RunFinish, RunPool, RunSheets, RunResample, RunPruning, RunSteps, RunNoise}) {
    run(threads, name);
  }
}

}  // namespace lipfast
