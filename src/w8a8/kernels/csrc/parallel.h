// A parallel loop on threads that somebody else owns.
#pragma once

#include <algorithm>
#include <atomic>

#include "internal.h"
#include "scratch.h"

namespace w8a8 {

// Calls fn(data) on up to `threads` threads at once, the calling one among them, and returns when all calls have
// returned.  How many calls really happen is the runtime's choice, at least one; the callee shares the work out itself.
void run_on_threads(void (*fn)(void *), void *data, int threads);

// What `threads = 0` means: the OpenMP setting of the calling thread.
int default_threads();

// Hands the indices [0, total) to whoever asks.  Every worker owns a contiguous share, so that memory is read in long
// runs, and takes from the others' when its own is used up, so that a thread that was descheduled holds nobody up.
// Nothing waits for a thread that has not started: any number of workers, one included, finishes the work.
class Shares {
 public:
  static constexpr int kMax = 64;

  void reset(int64_t total, int workers) {
    workers_ = workers < 1 ? 1 : workers > kMax ? kMax : workers;
    total_ = total;
    left_.store(total, std::memory_order_relaxed);
    for (int i = 0; i < workers_; ++i) {
      share_[i].next.store(total * i / workers_, std::memory_order_relaxed);
      share_[i].end = total * (i + 1) / workers_;
    }
  }

  // The next index for this worker, or -1.
  int64_t take(int worker) {
    for (int i = 0; i < workers_; ++i) {
      Share &s = share_[(worker + i) % workers_];
      if (s.next.load(std::memory_order_relaxed) >= s.end) continue;
      const int64_t got = s.next.fetch_add(1, std::memory_order_relaxed);
      if (got < s.end) return got;
    }
    return -1;
  }

  void done() { left_.fetch_sub(1, std::memory_order_release); }
  bool all_done() const { return left_.load(std::memory_order_acquire) == 0; }
  int64_t total() const { return total_; }

  // Until every index taken by anyone is done.  They were taken by running threads, so this ends.
  void wait() const;

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  Share share_[kMax];
  alignas(64) std::atomic<int64_t> left_{0};
  int workers_ = 1;
  int64_t total_ = 0;
};

// Calls fn(i, worker) for every i of [0, count), on at most `threads` threads, in the arithmetic of the contract.
template <class Fn>
void for_each_by_worker(int64_t count, int threads, const Fn &fn) {
  struct Loop {
    const Fn &fn;
    Shares shares;
    std::atomic<int> workers{0};
  } loop{fn, {}, {}};
  if (threads <= 0) threads = default_threads();
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  loop.shares.reset(count, threads);
  run_on_threads(
      [](void *data) {
        Loop &l = *static_cast<Loop *>(data);
        const DefaultFloat contract;
        const int me = l.workers.fetch_add(1, std::memory_order_relaxed);
        for (int64_t i; (i = l.shares.take(me)) >= 0;) l.fn(i, me);
      },
      &loop, threads);
}

// Calls fn(i), likewise.
template <class Fn>
void for_each(int64_t count, int threads, const Fn &fn) {
  for_each_by_worker(count, threads, [&](int64_t i, int) { fn(i); });
}

// Calls fn(i, memory), likewise, with so many bytes that are the thread's own; W8A8_NO_MEMORY where one cannot have them.
template <class Fn>
int for_each_with(int64_t bytes, int64_t count, int threads, const Fn &fn) {
  std::atomic<bool> starved{false};
  for_each(count, threads, [&](int64_t i) {
    static thread_local Scratch scratch;
    char *memory = scratch.get(bytes);
    if (!memory) return starved.store(true, std::memory_order_relaxed);
    fn(i, memory);
    scratch.shrink();
  });
  return starved.load(std::memory_order_relaxed) ? W8A8_NO_MEMORY : W8A8_OK;
}

}  // namespace w8a8
