// What becomes of a chunk that fails.
#include <atomic>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/arena.h"
#include "cpu/pool.h"
#include "support.h"

namespace lipfast {

void RunPool() {
  constexpr int64_t kChunks = 4096, kFailing = 4000;
  for (int threads : {1, 2, 3}) {
    std::atomic<int64_t> done{0};
    std::string seen;
    try {
      ParallelFor(threads, kChunks, [&](int64_t chunk) {
        if (chunk == kFailing) throw std::runtime_error("no memory for chunk 4000");
        ++done;
      });
    } catch (const std::runtime_error& failure) {
      seen = failure.what();
    }
    Expect(seen == "no memory for chunk 4000", "pool: the caller gets what a chunk threw");
    Expect(done < kChunks && done > kChunks / 2, "pool: other groups of chunks end as they would");
    done = 0;
    ParallelFor(threads, kChunks, [&](int64_t) { ++done; });
    Expect(done == kChunks, "pool: the next job knows nothing of it");
  }
}

void RunArenas() {
  constexpr int64_t kBytes = 4 << 20, kMost = ReusedArena::kMostKept / kBytes;
  const float* first = nullptr;
  {
    const ReusedArena arena(kBytes, true);
    first = arena.data();
    arena.data()[5] = 7;
  }
  Expect(ReusedArena(kBytes, false).data() == first, "arenas: what was dropped is used again");
  Expect(ReusedArena(kBytes, false).data()[5] == 7, "arenas: with the numbers that it held");
  {
    const ReusedArena arena(kBytes, true), other(kBytes, true), larger(2 * kBytes, true);
    Expect(arena.data() == first && arena.data()[5] == 0, "arenas: or with zeros");
    Expect(other.data() != first && larger.data() != first, "arenas: not while it is in use");
  }
  std::vector<std::unique_ptr<ReusedArena>> many;
  std::vector<const float*> dropped;
  for (int64_t i = 0; i < kMost + 3; ++i) many.push_back(std::make_unique<ReusedArena>(kBytes, true));
  for (auto& arena : many) {
    dropped.push_back(arena->data());
    arena.reset();
  }
  for (int64_t i = 0; i < kMost; ++i) {
    many[i] = std::make_unique<ReusedArena>(kBytes, false);
    Expect(many[i]->data() == dropped[kMost + 2 - i], "arenas: those that were dropped last are kept");
  }
}

}  // namespace lipfast
