// A network as two lists of steps over planned memory: forward and backward.
//
// The planner (lipfast/engine/plan.py) decides everything: which maps exist, where
// they lie in the arena, which may share memory, when a halo is filled. A Program
// only owns the memory and runs the steps in order; nothing in it depends on the
// number of threads. Indices and offsets are trusted: csrc/bindings/engine.cc
// checks each step when it is added.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu/arena.h"
#include "cpu/attention.h"
#include "cpu/channel_attention.h"
#include "cpu/channels.h"
#include "cpu/conv.h"
#include "cpu/finish.h"
#include "cpu/group_norm.h"
#include "cpu/heads.h"
#include "cpu/lanes.h"
#include "cpu/layer_norm.h"
#include "cpu/norm.h"
#include "cpu/pointwise.h"
#include "cpu/pool2d.h"
#include "cpu/prelu.h"
#include "cpu/resample.h"
#include "cpu/response_norm.h"
#include "engine/pace.h"
#include "engine/spare.h"

namespace lipfast {

enum class Section { kForward = 0, kBackward = 1 };

// The taps of AxisTaps with their memory.
struct AxisTable {
  std::vector<int32_t> first, second;
  std::vector<float> weight;

  AxisTaps View() const {
    return {static_cast<int64_t>(first.size()), first.data(), second.empty() ? nullptr : second.data(),
            weight.empty() ? nullptr : weight.data()};
  }
};

// Where a norm's numbers lie: offsets into values and statistics, -1 for none.
struct NormOffsets {
  int64_t gamma, beta;                     // in values and gradients
  int64_t running_mean, running_variance;  // in statistics
  int64_t saved;                           // in statistics: means, then inverse deviations
  int64_t gamma_step = 1, beta_step = 1;   // of a finish; 0: the first number is that of all channels
  int64_t slope = -1;                      // in values: of the activation behind a finish or group norm, where learned
};

// Time spent in one step since the last ResetProfile.
struct StepTime {
  std::string label;
  Section section;
  double seconds;
};

class Program {
 public:
  // keeps_weights: between two Loads the weights stay as they are, so convolutions prepare them once.
  explicit Program(bool keeps_weights) : keeps_weights_(keeps_weights) {}

  // Convolutions are added first: how wide a halo their gradients want decides how
  // much memory the maps need. Then comes the memory, then maps and steps.
  // Throws std::bad_alloc when the memory cannot be had.
  //   map_floats        memory for maps
  //   value_count       trainable numbers: as many gradients
  //   statistic_count   running statistics and what BatchNorm keeps for backward
  void Allocate(int64_t map_floats, int64_t value_count, int64_t statistic_count);

  // Trainable numbers and their gradients; BatchNorm's statistics.
  float* values() const { return vectors_->data(); }
  float* gradients() const { return values() + Padded(value_count_); }
  float* statistics() const { return gradients() + Padded(value_count_); }
  int64_t value_count() const { return value_count_; }
  int64_t statistic_count() const { return statistic_count_; }
  int64_t map_floats() const { return map_floats_; }
  int64_t bytes() const;

  // Copies numbers to where the program keeps them; `to` is in values() or statistics(). A program that keeps
  // its weights prepares them for its kernels once after each load.
  struct Source {
    const float* from;
    float* to;
    int64_t count;
  };
  void Load(const std::vector<Source>& sources, int threads);

  // A map at `offset` floats into the arena, the first float of its halo.
  // Every step-th of the channels [first, last) of `whole` makes another map.
  int AddMap(const LaneMap& shape, int64_t offset);
  int AddChannels(int whole, int64_t first, int64_t last, int64_t step);
  const LaneMap& map(int index) const { return maps_[index]; }
  int map_count() const { return static_cast<int>(maps_.size()); }

  int AddConv(const ConvShape& shape, const ConvGeometry& geometry, const uint8_t* mask, ConvKernel asked, bool exact);
  const Conv& conv(int index) const { return *convs_[index].conv; }
  const ConvGeometry& geometry(int index) const { return convs_[index].geometry; }
  const ConvShape& shape(int index) const { return convs_[index].shape; }
  int conv_count() const { return static_cast<int>(convs_.size()); }

  // Steps. Maps and convs by index; `values` and `bias` are offsets, -1 for none.
  void FromPlain(Section where, int plain, int map);
  void ToPlain(Section where, int map, int plain);
  void Clear(Section where, int map);
  void FillHalo(Section where, int map, Padding mode, int64_t pad);
  void Reblock(Section where, int from, int to);
  // Between a map and its items as rows of features: (1, features, height, width), a pixel for each item.
  void Flatten(Section where, int map, int rows, bool to_map);
  void ConvForward(Section where, int conv, int64_t values, int64_t bias, int x, int y, const HaloSpec& halo);
  // A convolution and the Finish behind it.
  struct FinishedConv {
    int conv;
    int64_t values, bias;
    float epsilon;
    NormOffsets offsets;
    ActivationSpec act;
  };
  // Without gradients: both as one, for activations that Conv can do; y lies apart from the residual.
  void ConvFinish(const FinishedConv& conv, int x, int residual, int y, const HaloSpec& halo);
  // Without gradients: two that Conv::IsPair, with any activations. The map between them gets no memory.
  void ConvPair(const FinishedConv& first, const FinishedConv& second, int x, const LaneMap& between,
                const HaloSpec& between_halo, int y, const HaloSpec& halo);
  // In the forward section: a transposed convolution, whose own gradient is ConvForward.
  void ConvInputGradient(Section where, int conv, int64_t values, int dy, int dx);
  void ConvWeightGradient(int conv, int64_t values, int64_t bias, int x, int dy);
  // The gradient of a bias: the sum over the pixels of each channel; dead ones are zero.
  void ChannelSums(int64_t bias, int dy);
  // `recover`: y lies where x does, and the backward pass reads it there.
  void NormForward(int x, int y, const NormSpec& spec, const NormOffsets& offsets, bool training, const HaloSpec& halo,
                   bool recover);
  void NormBackward(int x, int dy, int dy2, int dx, const NormSpec& spec, const NormOffsets& offsets, bool training,
                    bool zero_halo, bool recover);
  void GroupNorm(int x, int y, const GroupNormSpec& spec, const NormOffsets& offsets, const HaloSpec& halo);
  void GroupNormBackward(int x, int dy, int dx, const GroupNormSpec& spec, const NormOffsets& offsets);
  void LayerNorm(int x, int y, float epsilon, bool centred, const NormOffsets& offsets);
  void LayerNormBackward(int x, int dy, int dx, float epsilon, bool centred, const NormOffsets& offsets,
                         bool accumulate);
  struct BiasPlace {
    int64_t start, count;  // in the values, rows
    bool trained;
    std::vector<int32_t> rows;  // of each problem
  };
  struct AttentionForm {
    int64_t problems, features, value_features, queries, keys;
    float scale, epsilon;
    bool safe;
    std::array<HeadPlaces, 4> places;  // of queries, keys, values and what they see
    std::vector<BiasPlace> biases;     // at most one of them trained
    int64_t factors;                   // start in the values; -1: none
    bool factors_trained;
  };
  void Attention(int query, int key, int value, int seen, const AttentionForm& form);
  // The gradients are added to what their maps hold; -1: not wanted.
  void AttentionBackward(int query, int key, int value, int dy, int dquery, int dkey, int dvalue,
                         const AttentionForm& form);
  struct ChannelAttentionForm {
    int64_t problems, channels;
    float scale, epsilon;
    std::vector<int32_t> pictures;               // of each problem
    std::array<std::vector<int32_t>, 4> firsts;  // the first channel of each, as `places`
    int64_t factors;                             // start in the values; -1: none
    bool factors_trained;
  };
  void ChannelAttention(int query, int key, int value, int seen, const ChannelAttentionForm& form);
  // As AttentionBackward.
  void ChannelAttentionBackward(int query, int key, int value, int dy, int dquery, int dkey, int dvalue,
                                const ChannelAttentionForm& form);
  // residual, factor -1: none; a running mean of -1: no BatchNorm.
  void Finish(Section where, int x, int residual, int factor, int y, float epsilon, const NormOffsets& offsets,
              ActivationSpec act, const HaloSpec& halo);
  // The slopes lie `step` apart in the values; step 0: one for all channels. dx -1: not wanted.
  void Prelu(int x, int y, int64_t slopes, int64_t step);
  void PreluBackward(int x, int dy, int dx, int64_t slopes, int64_t step, bool accumulate);
  void Activate(int x, int y, ActivationSpec act);
  void ActivateBackward(int x, int dy, int dx, ActivationSpec act, bool accumulate);
  void Combine(Section where, int a, float a_scale, int b, float b_scale, float shift, int y);
  void Multiply(Section where, int a, int b, int y, bool accumulate);
  // b -1: the sums of a.
  void DotPlanes(int a, int b, int y, bool accumulate);
  // The gradient of one value: the sum over all pixels of a * b; b -1: of a.
  void Total(int64_t value, int a, int b);
  // y, of one channel, is scale times the sum over channels of a * b; b -1: of a.
  void DotChannels(Section where, int a, int b, float scale, int y, bool accumulate);
  void LargestChannel(int x, int y);
  void LargestChannelBackward(int x, int dy, int dx, bool shared, bool accumulate);
  void ResponseNorm(int x, int y, float epsilon);
  void ResponseNormBackward(int x, int dy, int dx, float epsilon, bool accumulate);
  void PixelNorm(int x, int y, float epsilon);
  void PixelNormBackward(int x, int dy, int dx, float epsilon, bool accumulate);
  void Upsample2(bool bilinear, int x, int y);
  void Upsample2Backward(bool bilinear, int dy, int dx, bool accumulate);
  void Shuffle(Section where, int many, int large, bool to_large, bool accumulate);
  void Resample(int x, int y, const AxisTable& rows, const AxisTable& columns);
  void ResampleBackward(int dy, int dx, const AxisTable& rows, const AxisTable& columns);
  void Pool(int x, int y, const PoolSpec& spec, const HaloSpec& halo);
  void Mean(int x, int y);
  void MeanBackward(int dy, int dx);
  void MeanTo(int x, int y);
  void MeanToBackward(int dy, int dx);
  void PoolBackward(int x, int dy, int dx, const PoolSpec& spec);

  // The tensors that FromPlain and ToPlain of a section use, by index.
  int plain_count(Section where) const { return plain_count_[static_cast<int>(where)]; }
  // The map that a plain tensor of a section is copied to or from.
  const LaneMap& plain_map(Section where, int plain) const;

  // Runs a section. plains: plain_count(where) tensors of the shapes of their maps.
  void Run(Section where, const PlainMap* plains, int threads);

  // From the next Run on, measures the time of each step (or stops doing so).
  void SetProfile(bool on);
  std::vector<StepTime> Profile() const;

 private:
  struct AttentionLists;
  struct ChannelAttentionLists;
  struct RunContext {
    const PlainMap* plains;
    float* scratch;
    int threads;
  };
  struct Step {
    std::string label;
    std::function<void(const RunContext&)> run;
    double seconds = 0;
  };
  struct ConvEntry {
    std::unique_ptr<Conv> conv;
    ConvShape shape;
    ConvGeometry geometry;
    int64_t prepared;       // where its weights lie in prepared_, in their kernel's form,
    int64_t prepared_load;  // and which load they were made from
  };

  static int64_t Padded(int64_t floats) { return (floats + 15) / 16 * 16; }
  void Add(Section where, std::string label, std::function<void(const RunContext&)> run);
  void RunConv(int conv, const float* values, const float* bias, const LaneMap& x, const LaneMap& y, const ConvEnd& end,
               const RunContext& context);
  struct Affine;
  void Renew(const FinishedConv& conv, Affine* affine) const;
  ConvEnd EndOf(const FinishedConv& conv, const Affine& affine) const;
  // The weights in their kernel's form, for as long as they stay loaded.
  const float* Prepared(int conv, const float* values, const LaneMap& x, const ConvEnd& end, const RunContext& context);
  // Memory that every convolution may use, for that many threads.
  float* Scratch(int threads);
  LivePixelMask LiveMask(const LaneMap& map);
  // Of the BatchNorm that saves its statistics there, whichever pass asks first.
  SpareInputs* SpareOf(int64_t saved);
  NormState StateOf(const NormOffsets& offsets, int64_t channels) const;
  float* GradientAt(int64_t offset) const;  // null: there is none
  GroupNormState GroupStateOf(const NormOffsets& offsets, int64_t count) const;
  NormNumbers NumbersOf(const NormOffsets& offsets, float epsilon) const;
  // The activation with the slope that the values hold now.
  ActivationSpec WithSlope(ActivationSpec act, const NormOffsets& offsets) const;

  int64_t map_floats_ = 0, value_count_ = 0, statistic_count_ = 0;
  std::unique_ptr<Arena> memory_, vectors_, scratch_, prepared_;
  std::vector<LaneMap> maps_;
  std::vector<ConvEntry> convs_;
  std::vector<std::unique_ptr<std::vector<float>>> masks_;
  std::map<int64_t, SpareInputs> spares_;
  std::vector<Step> steps_[2];
  Pace paces_[2];
  std::vector<int> plain_maps_[2];
  int plain_count_[2] = {0, 0};
  int scratch_threads_ = 0;
  int64_t scratch_floats_ = 0;  // that steps other than convolutions use
  bool keeps_weights_;
  int64_t loads_ = 0;
  bool profile_ = false;
};

}  // namespace lipfast
