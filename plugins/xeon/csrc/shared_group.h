// Ranks on one host that meet in a piece of shared memory. Nothing here is named in a file system, so nothing can be left behind.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "isa.h"

namespace sglang_xeon {

// One rank's view of the group. Calls come from one thread at a time and, over the ranks, in the same order with the same sizes; where
// they do not, or a rank dies, or none of it is heard of for `timeout` seconds, a call throws std::runtime_error on every rank.
class SharedGroup {
 public:
  static constexpr int64_t kMaxRanks = 16;
  static int64_t bytes_needed(int64_t size);

  // `fd`: bytes_needed(size) bytes of zeros, mapped by every rank. `peers[r]`: a pidfd of rank r's process; owned from here on.
  SharedGroup(int fd, int64_t rank, int64_t size, double timeout, std::vector<int64_t> peers);
  ~SharedGroup();
  SharedGroup(const SharedGroup&) = delete;
  SharedGroup& operator=(const SharedGroup&) = delete;

  void all_reduce(void* x, DType dtype, int64_t count);  // in place
  void all_gather(const void* x, void* out, int64_t bytes);  // out: [size, bytes]
  void broadcast(void* x, int64_t bytes, int64_t src);
  void send(const void* x, int64_t bytes, int64_t dst);
  void recv(void* x, int64_t bytes, int64_t src);
  void barrier();

 private:
  struct Shared;
  enum Call : uint32_t { kReduce = 1, kGather, kBroadcast, kBarrier };

  void arrive(Call call, int64_t bytes);
  template <typename Done>
  void wait(int64_t peer, Done done);
  [[noreturn]] void fail(const char* what, int64_t peer);
  char* slot(int64_t rank) const;  // where `rank` puts its part of the current chunk
  char* result() const;

  Shared* shared_;
  int64_t rank_, size_;
  double timeout_;
  std::vector<int64_t> peers_;
  uint32_t step_ = 0;
};

}  // namespace sglang_xeon
