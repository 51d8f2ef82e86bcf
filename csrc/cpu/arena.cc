#include "cpu/arena.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace lipfast {
namespace {
constexpr int64_t kLargePage = int64_t{2} << 20;
constexpr int64_t kLine = 64;
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

}  // namespace lipfast
