#include "cpu/pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace lipfast {
namespace {

// How long a thread without work stays awake: longer than the gaps inside a
// training step, shorter than anything a neighbour would notice.
constexpr auto kStayAwake = std::chrono::microseconds(50);
constexpr int kSpinsBetweenClockReads = 64;

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

class Pool {
 public:
  void Run(int threads, int64_t chunks, ChunkFunction body, void* context) {
    std::unique_lock<std::mutex> only_job(job_mutex_, std::try_to_lock);
    if (threads < 2 || chunks < 2 || inside_chunk || !only_job.owns_lock()) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) body(context, chunk);
      return;
    }
    Grow(threads - 1);
    body_ = body;
    context_ = context;
    chunks_ = chunks;
    done_.store(0, std::memory_order_relaxed);
    allowed_.store(threads - 1, std::memory_order_relaxed);
    unclaimed_.store(chunks, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
    Work();
    const auto finished = [&] { return done_.load(std::memory_order_acquire) == chunks; };
    // A worker in its last chunk: wait a little, then leave the core to it.
    while (!SpinUntil(finished)) sched_yield();
  }

 private:
  // Claims chunks until none is left. The fields of a job are read only after
  // a claim succeeded: until that chunk is done the job cannot end.
  void Work() {
    inside_chunk = true;
    int64_t left = unclaimed_.load(std::memory_order_acquire);
    while (left > 0) {
      if (unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {
        body_(context_, chunks_ - left);
        done_.fetch_add(1, std::memory_order_acq_rel);
        left = unclaimed_.load(std::memory_order_acquire);
      }
    }
    inside_chunk = false;
  }

  void Serve(int index) {
    const auto work_waits = [&] {
      return unclaimed_.load(std::memory_order_seq_cst) > 0 && index < allowed_.load(std::memory_order_relaxed);
    };
    for (;;) {
      if (!SpinUntil(work_waits)) {
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, work_waits);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
      Work();
    }
  }

  void Grow(int workers) {
    for (; workers_ < workers; ++workers_) {
      std::thread([this, index = workers_] { Serve(index); }).detach();
    }
  }

  std::mutex job_mutex_;
  ChunkFunction body_ = nullptr;
  void* context_ = nullptr;
  int64_t chunks_ = 0;
  int workers_ = 0;
  alignas(64) std::atomic<int64_t> unclaimed_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> allowed_{0};
  std::atomic<int> sleeping_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

// Never destroyed: workers may outlive static destructors. A forked child has
// none of the parent's threads, so it gets a new pool and leaves the old one.
Pool* pool = nullptr;

Pool& ThePool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] {
      pool = new Pool;
      inside_chunk = false;
    });
  });
  return *pool;
}

}  // namespace

void RunChunks(int threads, int64_t chunks, ChunkFunction body, void* context) {
  ThePool().Run(threads, chunks, body, context);
}

}  // namespace lipfast
