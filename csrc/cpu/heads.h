// What attention works on, as lists: where tokens lie in maps, and which problems may run at once.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention.h"

namespace lipfast {

// Where a map has the tokens of each problem.
struct HeadPlaces {
  std::vector<int32_t> pixels;    // [problems][tokens], counted picture by picture, row by row
  std::vector<int32_t> channels;  // [problems]: of the first feature; the others lie behind it
};

// The place of each token's first feature among a map's floats.
std::vector<int64_t> PlacesIn(const LaneMap& map, const HeadPlaces& places);

// Places of each problem's tokens in rising order, so that tokens side by side are neighbours; and those of another map
// in the same order.
class RisingOrder {
 public:
  RisingOrder(int64_t problems, const std::vector<int64_t>& at);
  std::vector<int64_t> Of(const std::vector<int64_t>& places) const;

 private:
  std::vector<int64_t> from_;  // for each place in order, the one that it was
};

// Problems in runs that may be worked on at once: run i ends before order[ends[i]]. together: kTogether if first tokens
// of so many in a row lie side by side anywhere, or 1.
struct ProblemRuns {
  std::vector<int64_t> order, ends;
  int64_t together = 1;
};

// Those of one row, an entry for each problem, are one run; without rows each is, and kTogether side by side. Problems
// whose tokens lie in other lanes of the same vectors follow each other, for lines of the cache hold all lanes; `at`:
// `PlacesIn` of the queries.
ProblemRuns RunsOf(int64_t problems, const std::vector<int32_t>& rows, const std::vector<int64_t>& at);

// Which tokens can be moved together, see HeadMap.
struct Neighbours {
  std::vector<int32_t> runs, steps;  // no steps where no problems are gathered together
  Neighbours(const ProblemRuns& problems, const std::vector<int64_t>& at);
};

}  // namespace lipfast
