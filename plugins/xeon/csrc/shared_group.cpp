// Collectives in shared memory. A rank writes its part into its own slot, says that it has arrived, waits until all have, and reads
// theirs. Slots come in pairs that alternate: who writes the third chunk has seen everybody arrive at the second, so all have read the first.

#include "shared_group.h"

#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#include <immintrin.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "parallel.h"

namespace sglang_xeon {

namespace {

constexpr int64_t kSlotBytes = 1 << 20, kMailBytes = 1 << 16;
constexpr int64_t kOneShotBytes = 1 << 16;  // up to here every rank adds up everything; beyond, each its share
constexpr int64_t kCopyBytes = 1 << 17;     // a task of a copy
constexpr int kPausesPerYield = 256, kPausesPerLook = 1024;
constexpr auto kSpin = std::chrono::milliseconds(2), kLook = std::chrono::milliseconds(20);

struct alignas(64) Mark {
  std::atomic<uint32_t> count;
  uint32_t call[2];  // what the rank called, by the parity of its count
  int64_t bytes[2];
};

struct CopyArgs {
  char* to;
  const char* from;
  int64_t bytes;
};

void copy_some(const void* opaque, int64_t index) {
  const CopyArgs& a = *static_cast<const CopyArgs*>(opaque);
  int64_t begin = index * kCopyBytes, bytes = std::min(kCopyBytes, a.bytes - begin);
  std::memcpy(a.to + begin, a.from + begin, size_t(bytes));
}

void copy(void* to, const void* from, int64_t bytes) {
  CopyArgs args{static_cast<char*>(to), static_cast<const char*>(from), bytes};
  run_tasks((bytes + kCopyBytes - 1) / kCopyBytes, copy_some, &args);
}

}  // namespace

struct SharedGroup::Shared {
  Mark arrived[kMaxRanks];
  Mark sent[kMaxRanks][kMaxRanks], taken[kMaxRanks][kMaxRanks];  // [from][to]
  std::atomic<uint32_t> broken;
};

static constexpr int64_t kHeader = 1 << 17;

int64_t SharedGroup::bytes_needed(int64_t size) {
  static_assert(sizeof(Shared) <= size_t(kHeader));
  return kHeader + 2 * (size + 1) * kSlotBytes + size * size * kMailBytes;
}

SharedGroup::SharedGroup(int fd, int64_t rank, int64_t size, double timeout, std::vector<int64_t> peers)
    : rank_(rank), size_(size), timeout_(timeout), peers_(std::move(peers)) {
  void* memory = mmap(nullptr, size_t(bytes_needed(size)), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("sglang_xeon: cannot map the memory that the ranks share");
  shared_ = static_cast<Shared*>(memory);  // zeros are its initial state
}

SharedGroup::~SharedGroup() {
  munmap(shared_, size_t(bytes_needed(size_)));
  for (int64_t fd : peers_)
    if (fd >= 0) close(int(fd));
}

char* SharedGroup::slot(int64_t rank) const {
  return reinterpret_cast<char*>(shared_) + kHeader + ((step_ & 1) * (size_ + 1) + rank) * kSlotBytes;
}

char* SharedGroup::result() const { return slot(size_); }

void SharedGroup::fail(const char* what, int64_t peer) {
  shared_->broken.store(1);  // nobody waits any longer than I did
  throw std::runtime_error(
      "sglang_xeon: rank " + std::to_string(rank_) + " of " + std::to_string(size_) + ": rank " + std::to_string(peer) + " " + what);
}

// Spins at first, as ranks are in step; then yields, then sleeps, so that a rank which shares its core is not held up.
template <typename Done>
void SharedGroup::wait(int64_t peer, Done done) {
  if (done()) return;
  auto start = std::chrono::steady_clock::now(), look = start + kLook;
  for (int spins = 1; !done(); ++spins) {
    if (spins % kPausesPerYield)
      _mm_pause();
    else
      sched_yield();
    if (spins % kPausesPerLook) continue;
    if (shared_->broken.load()) fail("or another has failed", peer);
    auto now = std::chrono::steady_clock::now();
    if (now - start > kSpin) usleep(50);
    if (now < look) continue;
    look = now + kLook;
    pollfd state{int(peers_[size_t(peer)]), POLLIN, 0};  // readable once the process has ended
    if (poll(&state, 1, 0) == 1 && !done()) fail("has ended", peer);
    if (now - start > std::chrono::duration<double>(timeout_)) fail("has not answered within the time that --dist-timeout gives", peer);
  }
}

void SharedGroup::arrive(Call call, int64_t bytes) {
  if (shared_->broken.load(std::memory_order_relaxed)) fail("or another has failed before", (rank_ + 1) % size_);
  uint32_t now = shared_->arrived[rank_].count.load(std::memory_order_relaxed) + 1;
  Mark& mine = shared_->arrived[rank_];
  mine.call[now & 1] = call, mine.bytes[now & 1] = bytes;
  mine.count.store(now, std::memory_order_release);
  for (int64_t peer = 0; peer < size_; ++peer) {
    const Mark& theirs = shared_->arrived[peer];
    wait(peer, [&] { return int32_t(theirs.count.load(std::memory_order_acquire) - now) >= 0; });
    if (theirs.call[now & 1] != call || theirs.bytes[now & 1] != bytes) fail("called another collective, or one of another size", peer);
  }
}

void SharedGroup::all_reduce(void* x, DType dtype, int64_t count) {
  int64_t item = dtype == DType::f32 ? 4 : 2, chunk = kSlotBytes / item;
  for (int64_t done = 0; done < count; done += chunk, ++step_) {
    int64_t n = std::min(chunk, count - done), bytes = n * item;
    char* mine = static_cast<char*>(x) + done * item;
    copy(slot(rank_), mine, bytes);
    arrive(kReduce, bytes);
    const void* parts[kMaxRanks];
    bool one_shot = size_ == 2 || bytes <= kOneShotBytes;
    int64_t share = one_shot ? n : (n + size_ - 1) / size_, begin = one_shot ? 0 : std::min(n, rank_ * share);
    for (int64_t r = 0; r < size_; ++r) parts[r] = slot(r) + begin * item;
    SumArgs sum{parts, size_, dtype, (one_shot ? mine : result()) + begin * item, std::min(share, n - begin)};
    if (sum.count > 0) kernels().sum_parts(sum);
    if (one_shot) continue;
    arrive(kReduce, bytes);
    copy(mine, result(), bytes);
  }
}

void SharedGroup::all_gather(const void* x, void* out, int64_t bytes) {
  for (int64_t done = 0; done < bytes; done += kSlotBytes, ++step_) {
    int64_t n = std::min(kSlotBytes, bytes - done);
    copy(slot(rank_), static_cast<const char*>(x) + done, n);
    arrive(kGather, n);
    for (int64_t r = 0; r < size_; ++r) copy(static_cast<char*>(out) + r * bytes + done, slot(r), n);
  }
}

void SharedGroup::broadcast(void* x, int64_t bytes, int64_t src) {
  for (int64_t done = 0; done < bytes; done += kSlotBytes, ++step_) {
    int64_t n = std::min(kSlotBytes, bytes - done);
    char* part = static_cast<char*>(x) + done;
    if (rank_ == src) copy(slot(src), part, n);
    arrive(kBroadcast, n);
    if (rank_ != src) copy(part, slot(src), n);
  }
}

void SharedGroup::barrier() {
  arrive(kBarrier, 0);
  ++step_;
}

void SharedGroup::send(const void* x, int64_t bytes, int64_t dst) {
  Mark &sent = shared_->sent[rank_][dst], &taken = shared_->taken[rank_][dst];
  char* mail = reinterpret_cast<char*>(shared_) + bytes_needed(size_) - (rank_ * size_ + dst + 1) * kMailBytes;
  for (int64_t done = 0; done < bytes; done += kMailBytes) {
    uint32_t now = sent.count.load(std::memory_order_relaxed);
    wait(dst, [&] { return taken.count.load(std::memory_order_acquire) == now; });
    sent.bytes[0] = bytes;
    std::memcpy(mail, static_cast<const char*>(x) + done, size_t(std::min(kMailBytes, bytes - done)));
    sent.count.store(now + 1, std::memory_order_release);
  }
}

void SharedGroup::recv(void* x, int64_t bytes, int64_t src) {
  Mark &sent = shared_->sent[src][rank_], &taken = shared_->taken[src][rank_];
  const char* mail = reinterpret_cast<char*>(shared_) + bytes_needed(size_) - (src * size_ + rank_ + 1) * kMailBytes;
  for (int64_t done = 0; done < bytes; done += kMailBytes) {
    uint32_t now = taken.count.load(std::memory_order_relaxed);
    wait(src, [&] { return sent.count.load(std::memory_order_acquire) != now; });
    if (sent.bytes[0] != bytes) fail("sends a message of another size than is received", src);
    std::memcpy(static_cast<char*>(x) + done, mail, size_t(std::min(kMailBytes, bytes - done)));
    taken.count.store(now + 1, std::memory_order_release);
  }
}

}  // namespace sglang_xeon
