#include "cpu/pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace lipfast {
namespace {

// How long a thread without work stays awake: longer than the gaps inside a
// training step, shorter than anything a neighbour would notice.
constexpr auto kStayAwake = std::chrono::microseconds(50);
constexpr int kSpinsBetweenClockReads = 64;
constexpr int kApart = 128;  // bytes: processors fetch cache lines in pairs

inline void Relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Polls `ready` until it holds or kStayAwake has passed.
template <class Ready>
bool SpinUntil(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kStayAwake;
  do {
    for (int i = 0; i < kSpinsBetweenClockReads; ++i) {
      if (ready()) return true;
      Relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

thread_local bool inside_chunk = false;
bool forked = false;  // OpenMP would wait for threads that stayed with the parent

// A range of groups of chunks that is claimed from both ends: begin in the low half.
struct alignas(kApart) Range {
  std::atomic<uint64_t> packed{0};

  static uint64_t Pack(uint64_t begin, uint64_t end) { return begin | end << 32; }

  // The next group from the owner's end, or from the other end for a helper; -1 if none is left.
  int64_t Claim(bool owner) {
    uint64_t now = packed.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t begin = now & 0xffffffffu, end = now >> 32;
      if (begin >= end) return -1;
      const uint64_t rest = owner ? Pack(begin + 1, end) : Pack(begin, end - 1);
      if (packed.compare_exchange_weak(now, rest, std::memory_order_acq_rel)) return owner ? begin : end - 1;
    }
  }
};

constexpr int kMaxThreads = 128;
constexpr int kAnswering = 1;  // the thread that answers messages
// Claims a thread makes of its own range: few, as each costs as much as a small
// chunk; enough for others to take the end of a busy thread's range.
constexpr int64_t kClaims = 64;

class Pool {
 public:
  void Run(int threads, int64_t chunks, ChunkFunction body, void* context) {
    std::unique_lock<std::mutex> only_job(job_mutex_, std::defer_lock);
    if (threads < 2 || chunks < 2 || inside_chunk || !only_job.try_lock()) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) body(context, chunk);
      return;
    }
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads > chunks) threads = static_cast<int>(chunks);
    Grow(threads - 1);
    body_ = body;
    context_ = context;
    chunks_ = chunks;
    group_ = (chunks + threads * kClaims - 1) / (threads * kClaims);
    const int64_t groups = (chunks + group_ - 1) / group_;
    done_.store(0, std::memory_order_relaxed);
    parts_.store(threads, std::memory_order_relaxed);
    // Neighbouring chunks go to the same thread: two cores writing next to each
    // other would pull each other's cache lines by prefetching.
    for (int i = 0; i < threads; ++i) {
      ranges_[i].packed.store(Range::Pack(groups * i / threads, groups * (i + 1) / threads), std::memory_order_release);
    }
    job_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
    Work(0);
    const auto finished = [&] { return done_.load(std::memory_order_acquire) == groups; };
    // A worker in its last chunk: wait a little, then leave the core to it.
    while (!SpinUntil(finished)) sched_yield();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  // See pool.h. The shortest of a few: the other thread may be late for one.
  double RoundTrip() {
    constexpr int kMessages = 3;
    constexpr double kLongest = 2e-6;
    std::unique_lock<std::mutex> only_job(job_mutex_, std::defer_lock);
    if (inside_chunk || !only_job.try_lock() || workers_ == 0 || sleeping_.load(std::memory_order_relaxed) > 0)
      return 0;
    double least = kLongest;
    for (int i = 0; i < kMessages; ++i) {
      const auto start = std::chrono::steady_clock::now();
      const uint64_t message = question_.load(std::memory_order_relaxed) + 1;
      question_.store(message, std::memory_order_release);
      double took;
      do {
        took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (took >= kLongest) return 0;
      } while (answer_.load(std::memory_order_acquire) != message);
      if (took < least) least = took;
    }
    return least;
  }

 private:
  // Claims groups of the own range, then of the others', until none is left. The
  // fields of a job are read only after a claim succeeded: until that group is done
  // the job cannot end, so a thread that comes late finds nothing or the next job.
  // Groups are counted once at the end: a counter that all threads write costs as
  // much as a small group.
  void Work(int self) {
    inside_chunk = true;
    const int parts = parts_.load(std::memory_order_relaxed);
    int64_t done = 0;
    for (int i = 0; i < parts; ++i) {
      Range& range = ranges_[(self + i) % parts];
      for (int64_t group; (group = range.Claim(i == 0)) >= 0; ++done) {
        const int64_t end = group * group_ + group_ < chunks_ ? group * group_ + group_ : chunks_;
        try {
          for (int64_t chunk = group * group_; chunk < end; ++chunk) body_(context_, chunk);
        } catch (...) {  // no memory, say; the other groups end as they would
          Failed(std::current_exception());
        }
      }
    }
    if (done > 0) done_.fetch_add(done, std::memory_order_acq_rel);
    inside_chunk = false;
  }

  // Keeps the first failure of a job for the thread that waits for it.
  void Failed(std::exception_ptr failure) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    if (!failure_) failure_ = std::move(failure);
  }

  // seen: the last job that this thread needs not look at.
  void Serve(int self, uint64_t seen) {
    const auto work_waits = [&] { return job_.load(std::memory_order_seq_cst) != seen; };
    uint64_t answered = 0;
    const auto answer_or_work = [&] {
      if (self == kAnswering) {
        const uint64_t question = question_.load(std::memory_order_acquire);
        if (question != answered) answer_.store(answered = question, std::memory_order_release);
      }
      return work_waits();
    };
    for (;;) {
      if (!SpinUntil(answer_or_work)) {
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, work_waits);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = job_.load(std::memory_order_seq_cst);
      if (self < parts_.load(std::memory_order_relaxed)) Work(self);
    }
  }

  void Grow(int workers) {
    for (; workers_ < workers; ++workers_) {
      std::thread([this, self = workers_ + 1, seen = job_.load()] { Serve(self, seen); }).detach();
    }
  }

  std::mutex job_mutex_;
  ChunkFunction body_ = nullptr;
  void* context_ = nullptr;
  int64_t chunks_ = 0, group_ = 1;  // of the job; a group is claimed at once
  int workers_ = 0;
  Range ranges_[kMaxThreads];
  alignas(kApart) std::atomic<uint64_t> job_{0};
  alignas(kApart) std::atomic<int64_t> done_{0};
  alignas(kApart) std::atomic<int> parts_{1};
  alignas(kApart) std::atomic<uint64_t> question_{0};
  alignas(kApart) std::atomic<uint64_t> answer_{0};
  std::atomic<int> sleeping_{0};
  std::mutex failure_mutex_;
  std::exception_ptr failure_;  // of the job; read once all its groups are done
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

// Never destroyed: workers may outlive static destructors. Made when the library is loaded, before a thread of ours
// runs: a fork while another thread makes it would leave it half made. A forked child has none of the parent's
// threads, so it gets a new pool and leaves the old one.
Pool* pool = [] {
  pthread_atfork(nullptr, nullptr, [] {
    pool = new Pool;
    inside_chunk = false;
    forked = true;
  });
  return new Pool;
}();

}  // namespace

void RunChunks(int threads, int64_t chunks, ChunkFunction body, void* context) {
  pool->Run(threads, chunks, body, context);
}

double RoundTrip() { return pool->RoundTrip(); }

void EndOpenMpThreads() {
  constexpr int kSoft = 1;  // omp_pause_soft: settings stay
  using Pause = int (*)(int);
  static const auto pause = reinterpret_cast<Pause>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  if (pause && !forked) pause(kSoft);
}

}  // namespace lipfast
