// One block of zeroed memory, a large one in 2 MB pages where the system gives them:
// the maps of a network touch so many 4 KB pages that address translation would cost
// 5 - 25 % of a convolution's time.
#pragma once

#include <cstdint>
#include <memory>

namespace lipfast {

class Arena {
 public:
  // Throws std::bad_alloc when the system has no such memory.
  explicit Arena(int64_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  float* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  int64_t mapped_ = 0;  // bytes; 0: the memory is malloc's
  void* base_;
  float* data_;
};

// An arena that is kept when it is no longer wanted, for the next one of its size: callers that make a map in each call
// and drop it would else wait for the system to map and clear the same pages every time. At most kMostKept bytes are
// kept, those that were dropped last.
class ReusedArena {
 public:
  // Without `zeroed` it holds what was there before.
  ReusedArena(int64_t bytes, bool zeroed);
  ~ReusedArena();

  float* data() const { return arena_->data(); }
  int64_t bytes() const { return arena_->bytes(); }

  static constexpr int64_t kMostKept = int64_t{64} << 20;

 private:
  std::unique_ptr<Arena> arena_;
};

}  // namespace lipfast
