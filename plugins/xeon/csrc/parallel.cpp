// One team of threads for all kernels. OpenMP's join waits until every thread has shown up, and on a busy machine one that is
// not scheduled costs milliseconds a kernel; here the caller waits only for threads that have taken work, and does the
// rest itself. It also stays correct after fork(), where the workers are gone.

#include "parallel.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace sglang_xeon {

namespace {

constexpr auto kSpin = std::chrono::microseconds(60);  // between two kernels of a step a worker does not fall asleep
constexpr int kPausesPerYield = 256;

struct Job {
  Task task;
  const void* args;
  int64_t count;
  int64_t workers;  // those with a lower index take part
  bool stream;
  uint32_t generation;
};

// How many indexes of one thread's share of a stream were taken. A count is of the generation that it names, so that nobody has to
// clear those of all threads before a job.
struct alignas(64) Share {
  std::atomic<uint64_t> taken{0};

  int64_t take(uint32_t generation) {
    uint64_t none = uint64_t(generation) << 32, now = taken.load(std::memory_order_relaxed), mine;
    do mine = now >> 32 == generation ? now : none;
    while (!taken.compare_exchange_weak(now, mine + 1, std::memory_order_relaxed));
    return int64_t(mine - none);
  }
};

class Team {
 public:
  void run(int64_t threads, int64_t count, Task task, const void* args, bool stream) {
    // A second caller at the same time (a thread that packs weights, say) works alone.
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || threads <= 1) {
      for (int64_t i = 0; i < count; ++i) task(args, i);
      return;
    }
    grow(threads - 1);
    job_ = {task, args, count, threads - 1, stream, generation_.load(std::memory_order_relaxed) + 1};
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    generation_.fetch_add(1);
    if (asleep_.load() > 0) syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    take_all(threads - 1);
    open_.store(false);
    for (int spins = 1; inside_.load() != 0; ++spins) pause(spins);
  }

  // Ties worker i to cpus[i + 1].
  void pin(const int64_t* cpus, int64_t count) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = 1; i < count && i <= kMaxWorkers; ++i) cpu_plus_one_[i - 1].store(int(cpus[i]) + 1);
    grow(count - 1);
  }

 private:
  static constexpr int64_t kMaxWorkers = 1023;

  static void pause(int spins) {
    if (spins % kPausesPerYield == 0)
      sched_yield();
    else
      _mm_pause();
  }

  // `rank`: of the threads that take part, the caller is the last.
  void take_all(int64_t rank) {
    if (!job_.stream) {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < job_.count;) job_.task(job_.args, i);
      return;
    }
    for (int64_t i = 0, threads = job_.workers + 1; i < threads; ++i) {
      int64_t share = (rank + i) % threads, begin = job_.count * share / threads, end = job_.count * (share + 1) / threads;
      for (int64_t at; (at = begin + shares_[share].take(job_.generation)) < end;) job_.task(job_.args, at);
    }
  }

  void grow(int64_t workers) {
    for (; size_ < workers && size_ < kMaxWorkers; ++size_) std::thread(&Team::work, this, size_).detach();
  }

  void work(int64_t index) {
    int tied = 0;
    for (uint32_t seen = 0;;) {
      seen = wait_for_more_than(seen);
      if (int cpu = cpu_plus_one_[index].load(std::memory_order_relaxed); cpu != tied) {
        tied = cpu;
        cpu_set_t mask;
        CPU_ZERO(&mask);
        CPU_SET(size_t(cpu - 1), &mask);
        sched_setaffinity(0, sizeof(mask), &mask);
      }
      inside_.fetch_add(1);
      if (open_.load() && index < job_.workers) take_all(index);
      inside_.fetch_sub(1);
    }
  }

  uint32_t wait_for_more_than(uint32_t seen) {
    auto until = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 1;; ++spins) {
      uint32_t now = generation_.load(std::memory_order_acquire);
      if (now != seen) return now;
      pause(spins);
      if (spins % 32 == 0 && std::chrono::steady_clock::now() > until) break;
    }
    for (;;) {
      asleep_.fetch_add(1);
      syscall(SYS_futex, &generation_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);  // not where it has moved on
      asleep_.fetch_sub(1);
      if (uint32_t now = generation_.load(std::memory_order_acquire); now != seen) return now;
    }
  }

  std::mutex mutex_;
  Job job_{};
  int64_t size_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  // A worker counts itself in before it looks whether the job is open; the caller closes the job before it looks who is in. So
  // once nobody is inside, nobody will touch the job again, however late a worker wakes up.
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<bool> open_{false};
  std::atomic<int> asleep_{0};
  std::atomic<int> cpu_plus_one_[kMaxWorkers] = {};  // 0: not tied
  Share shares_[kMaxWorkers + 1];
};

Team& team() {
  static Team* team = new Team;  // never destroyed: its workers outlive static destruction
  return *team;
}

thread_local int64_t own_threads = 0;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

int64_t num_threads() { return own_threads ? own_threads : default_num_threads(); }

void pin_team(const int64_t* cpus, int64_t count) {
  own_threads = count;
  team().pin(cpus, count);
}

static void run(int64_t count, Task task, const void* args, bool stream) {
  int64_t threads = num_threads();
  if (count < threads) threads = count;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(args, i);
    return;
  }
  team().run(threads, count, task, args, stream);
}

void run_tasks(int64_t count, Task task, const void* args) { run(count, task, args, false); }

void run_stream(int64_t count, Task task, const void* args) { run(count, task, args, true); }

void* scratch(Slot slot, size_t bytes) {
  static thread_local Buffer buffers[kNumSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, rounded);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace sglang_xeon
