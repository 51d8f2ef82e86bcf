// What attention works on, as lists: where tokens lie in maps, and which problems may run at once.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/lanes.h"

namespace lipfast {

// Where a map has the tokens of each problem.
struct HeadPlaces {
  std::vector<int32_t> pixels;    // [problems][tokens], counted picture by picture, row by row
  std::vector<int32_t> channels;  // [problems]: of the first feature; the others lie behind it
};

// The place of each token's first feature among a map's floats.
std::vector<int64_t> PlacesIn(const LaneMap& map, const HeadPlaces& places);

// Problems in runs that may be worked on at once: run i ends before order[ends[i]].
struct ProblemRuns {
  std::vector<int64_t> order, ends;
};

// Those of one row, an entry for each problem, are one run; without rows each is. Problems whose tokens lie in other
// lanes of the same vectors follow each other, for lines of the cache hold all lanes; `at`: `PlacesIn` of the queries.
ProblemRuns RunsOf(int64_t problems, const std::vector<int32_t>& rows, const std::vector<int64_t>& at);

}  // namespace lipfast
