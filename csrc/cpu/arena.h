// One block of zeroed memory, a large one in 2 MB pages where the system gives them:
// the maps of a network touch so many 4 KB pages that address translation would cost
// 5 - 25 % of a convolution's time.
#pragma once

#include <cstdint>

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

}  // namespace lipfast
