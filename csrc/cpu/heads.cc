#include "cpu/heads.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace lipfast {

std::vector<int64_t> PlacesIn(const LaneMap& map, const HeadPlaces& places) {
  const int64_t problems = static_cast<int64_t>(places.channels.size());
  const int64_t tokens = static_cast<int64_t>(places.pixels.size()) / problems, plane = map.height * map.width;
  std::vector<int64_t> found(places.pixels.size());
  for (int64_t i = 0; i < problems * tokens; ++i) {
    const int64_t picture = places.pixels[i] / plane, pixel = places.pixels[i] % plane;
    const int64_t y = pixel / map.width, x = pixel % map.width;
    const int64_t lane = LaneAt(picture % map.sheet(), y / map.block_h, x / map.block_w, map.grid);
    found[i] = picture / map.sheet() * map.batch_stride + places.channels[i / tokens] * map.channel_stride +
               y % map.block_h * map.row_stride + x % map.block_w * kGrid * kGrid + lane;
  }
  return found;
}

RisingOrder::RisingOrder(int64_t problems, const std::vector<int64_t>& at) : from_(at.size()) {
  std::iota(from_.begin(), from_.end(), 0);
  const auto tokens = static_cast<std::ptrdiff_t>(at.size()) / problems;
  for (auto first = from_.begin(); first != from_.end(); first += tokens) {
    std::stable_sort(first, first + tokens, [&](int64_t a, int64_t b) { return at[a] < at[b]; });
  }
}

std::vector<int64_t> RisingOrder::Of(const std::vector<int64_t>& places) const {
  std::vector<int64_t> ordered;
  ordered.reserve(places.size());
  for (int64_t i : from_) ordered.push_back(places[i]);
  return ordered;
}

bool SideBySide(const int64_t* problems, int64_t tokens, const int64_t* at) {
  for (int64_t i = 1; i < kTogether; ++i) {
    if (at[problems[i] * tokens] != at[problems[0] * tokens] + i) return false;
  }
  return true;
}

ProblemRuns RunsOf(int64_t problems, const std::vector<int32_t>& rows, const std::vector<int64_t>& at) {
  const int64_t tokens = static_cast<int64_t>(at.size()) / problems;
  ProblemRuns runs;
  runs.order.resize(problems);
  std::iota(runs.order.begin(), runs.order.end(), 0);
  const auto place = [&](int64_t problem) {
    return std::make_pair(rows.empty() ? 0 : rows[problem], at[problem * tokens] / (kGrid * kGrid));
  };
  std::stable_sort(runs.order.begin(), runs.order.end(), [&](int64_t a, int64_t b) { return place(a) < place(b); });
  const auto together = [&](int64_t i) {
    return i + kTogether <= problems && SideBySide(runs.order.data() + i, tokens, at.data());
  };
  for (int64_t i = 0; i < problems; ++i) {
    if (together(i)) runs.together = kTogether;
  }
  const auto end_of_run = [&](int64_t i) {
    if (rows.empty()) return i + (together(i) ? kTogether : 1);
    const int32_t row = rows[runs.order[i]];
    while (i < problems && rows[runs.order[i]] == row) ++i;
    return i;
  };
  for (int64_t i = 0; i < problems;) runs.ends.push_back(i = end_of_run(i));
  return runs;
}

Neighbours::Neighbours(const ProblemRuns& problems, const std::vector<int64_t>& at)
    : runs(at.size()), steps(problems.together > 1 ? at.size() : 0) {
  const std::vector<int64_t>& order = problems.order;
  const int64_t count = static_cast<int64_t>(order.size()), tokens = static_cast<int64_t>(at.size()) / count;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = order[i] * tokens, behind = first + tokens;
    int64_t pieces = 0;
    for (int64_t t = behind; t-- > first;) {
      const bool beside = t + 1 < behind && at[t + 1] == at[t] + 1;
      runs[t] = beside ? runs[t + 1] + 1 : 1;
      pieces += !beside;
    }
    if (pieces > tokens / 4) std::fill(runs.begin() + first, runs.begin() + behind, 0);
    if (problems.together == 1 || i + kTogether > count) continue;
    for (int64_t t = first; t < behind; ++t) {
      steps[t] = 1;
      for (int64_t k = 1; k < kTogether && steps[t]; ++k) steps[t] = at[order[i + k] * tokens + t - first] == at[t] + k;
    }
  }
}

}  // namespace lipfast
