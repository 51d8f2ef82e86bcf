// Which steps run on one thread, for made-up times and distances.
#include "engine/pace.h"
#include "support.h"

namespace lipfast {
namespace {

constexpr double kNear = 90e-9, kFar = 340e-9, kAsleep = 0;
constexpr double kSeconds[] = {50e-6, 5e-3};  // of a small and a large step, on all threads

struct Alone {
  int small = 0, large = 0, looks = 0;
};

// How often each step was alone in so many runs of both, and how often one asked.
Alone Run(Pace* pace, int runs, double round_trip, int threads = 2) {
  Alone alone;
  for (int i = 0; i < runs; ++i) {
    pace->Begin(2, threads);
    for (size_t step = 0; step < 2; ++step) {
      (step == 0 ? alone.small : alone.large) += pace->IsAlone(step);
      pace->Took(step, kSeconds[step] * (pace->IsAlone(step) ? 1.8 : 1));
      if (!pace->Looks()) continue;
      ++alone.looks;
      pace->Saw(round_trip);
    }
  }
  return alone;
}

}  // namespace

void RunPace() {
  Pace pace;
  Alone alone = Run(&pace, 20, kNear);
  Expect(alone.small == 0 && alone.large == 0 && alone.looks == 20, "pace: near each other, all steps on all threads");
  alone = Run(&pace, 20, kFar);
  Expect(alone.small == 19 && alone.large == 0, "pace: far from each other small steps run alone from the next run on");
  Expect(alone.looks < 6, "pace: it looks less often then");
  alone = Run(&pace, 20, kAsleep);
  Expect(alone.small == 20, "pace: no answer changes nothing");
  alone = Run(&pace, 20, kNear);
  Expect(alone.small < 9 && Run(&pace, 1, kNear).small == 0, "pace: and so it is noticed that they are near again");
  Run(&pace, 2, kFar);
  Expect(Run(&pace, 1, kFar).small == 1 && Run(&pace, 1, kFar, 3).small == 0, "pace: other threads start anew");
  Expect(Run(&pace, 20, kFar, 8).small == 0, "pace: for many threads a step is larger");
  Expect(Run(&pace, 20, kFar, 1).looks == 0, "pace: one thread asks nobody");
}

}  // namespace lipfast
