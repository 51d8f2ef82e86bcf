#include "cpu/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

namespace lipfast {
namespace {
constexpr int64_t kLargePage = int64_t{2} << 20;
constexpr int64_t kLine = 64;

// Arenas that wait for their next use, the newest last. Who finds the lock taken does without: a child that was forked
// while another thread held it would wait forever.
struct Waiting {
  std::mutex mutex;
  std::vector<std::unique_ptr<Arena>> arenas;

  std::unique_ptr<Arena> Take(int64_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = std::find_if(arenas.rbegin(), arenas.rend(), [&](const auto& a) { return a->bytes() == bytes; });
    if (found == arenas.rend()) return nullptr;
    std::unique_ptr<Arena> taken = std::move(*found);
    arenas.erase(std::next(found).base());
    return taken;
  }

  void Keep(std::unique_ptr<Arena> arena) {
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (!lock || arena->bytes() > ReusedArena::kMostKept) return;
    arenas.push_back(std::move(arena));
    int64_t kept = 0;
    for (const auto& a : arenas) kept += a->bytes();
    while (kept > ReusedArena::kMostKept) {
      kept -= arenas.front()->bytes();
      arenas.erase(arenas.begin());
    }
  }
};

// Never destroyed: maps may be dropped while the process ends.
Waiting& WaitingArenas() {
  static Waiting* const waiting = new Waiting;
  return *waiting;
}
}  // namespace

Arena::Arena(int64_t bytes) : bytes_(bytes) {
  if (bytes < 0) throw std::invalid_argument("arena: a negative number of bytes");
  if (bytes < kLargePage / 2) {  // to map and to zero a large page would take longer than most uses of so few
    const int64_t lines = (bytes + kLine - 1) / kLine + 1;
    base_ = std::aligned_alloc(kLine, lines * kLine);
    if (!base_) throw std::bad_alloc();
    data_ = static_cast<float*>(std::memset(base_, 0, lines * kLine));
    return;
  }
  mapped_ = (bytes + kLargePage - 1) / kLargePage * kLargePage + kLargePage;
  base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base_ == MAP_FAILED) throw std::bad_alloc();
  const auto address = (reinterpret_cast<uintptr_t>(base_) + kLargePage - 1) / kLargePage * kLargePage;
  data_ = reinterpret_cast<float*>(address);
#ifdef MADV_HUGEPAGE
  madvise(data_, mapped_ - kLargePage, MADV_HUGEPAGE);  // only advice: small pages work as well
#endif
}

Arena::~Arena() {
  if (mapped_ > 0) {
    munmap(base_, mapped_);
  } else {
    std::free(base_);
  }
}

ReusedArena::ReusedArena(int64_t bytes, bool zeroed) : arena_(WaitingArenas().Take(bytes)) {
  if (!arena_) {
    arena_ = std::make_unique<Arena>(bytes);
  } else if (zeroed) {
    std::memset(arena_->data(), 0, bytes);
  }
}

ReusedArena::~ReusedArena() {
  if (bytes() >= kLargePage / 2) WaitingArenas().Keep(std::move(arena_));
}

}  // namespace lipfast
