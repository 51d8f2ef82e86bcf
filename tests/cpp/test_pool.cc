// What becomes of a chunk that fails.
#include <atomic>
#include <stdexcept>

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

}  // namespace lipfast
