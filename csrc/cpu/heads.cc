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

ProblemRuns RunsOf(int64_t problems, const std::vector<int32_t>& rows, const std::vector<int64_t>& at) {
  const int64_t tokens = static_cast<int64_t>(at.size()) / problems;
  ProblemRuns runs;
  runs.order.resize(problems);
  std::iota(runs.order.begin(), runs.order.end(), 0);
  const auto row = [&](int64_t problem) { return rows.empty() ? problem : rows[problem]; };
  const auto place = [&](int64_t problem) {
    return std::make_pair(rows.empty() ? 0 : rows[problem], at[problem * tokens] / (kGrid * kGrid));
  };
  std::stable_sort(runs.order.begin(), runs.order.end(), [&](int64_t a, int64_t b) { return place(a) < place(b); });
  for (int64_t i = 1; i <= problems; ++i) {
    if (i == problems || row(runs.order[i]) != row(runs.order[i - 1])) runs.ends.push_back(i);
  }
  return runs;
}

}  // namespace lipfast
