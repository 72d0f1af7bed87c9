// Collectives of ranks on one host as torch ops. A group is known by a number.

#include <memory>
#include <mutex>

#include "bindings.h"
#include "shared_group.h"

namespace sglang_xeon {
namespace {

std::mutex groups_mutex;
std::vector<std::unique_ptr<SharedGroup>> groups;

int64_t group_bytes(int64_t size) { return SharedGroup::bytes_needed(size); }

int64_t group_open(int64_t fd, int64_t rank, int64_t size, double timeout, std::vector<int64_t> peers) {
  STD_TORCH_CHECK(
      0 <= rank && rank < size && size <= SharedGroup::kMaxRanks && int64_t(peers.size()) == size, "sglang_xeon: a group of ",
      size, " ranks; there is room for ", SharedGroup::kMaxRanks);
  auto group = std::make_unique<SharedGroup>(int(fd), rank, size, timeout, std::move(peers));
  std::lock_guard<std::mutex> lock(groups_mutex);
  groups.push_back(std::move(group));
  return int64_t(groups.size()) - 1;
}

void group_close(int64_t id) {
  std::lock_guard<std::mutex> lock(groups_mutex);
  groups.at(size_t(id)).reset();
}

SharedGroup& group(int64_t id) {
  std::lock_guard<std::mutex> lock(groups_mutex);
  STD_TORCH_CHECK(id >= 0 && id < int64_t(groups.size()) && groups[size_t(id)], "sglang_xeon: this group is closed");
  return *groups[size_t(id)];
}

int64_t bytes_of(const Tensor& x, const char* what) {
  STD_TORCH_CHECK(x.is_contiguous(), "sglang_xeon: ", what, " takes a contiguous tensor");
  return x.numel() * int64_t(x.element_size());
}

void group_all_reduce(Tensor x, int64_t id) {
  bytes_of(x, "all_reduce");
  group(id).all_reduce(x.data_ptr(), dtype_of(x, "all_reduce's tensor"), x.numel());
}

void group_all_gather(const Tensor& x, Tensor out, int64_t id) {
  int64_t bytes = bytes_of(x, "all_gather");
  STD_TORCH_CHECK(bytes_of(out, "all_gather") % std::max<int64_t>(bytes, 1) == 0, "sglang_xeon: all_gather's output does not fit");
  group(id).all_gather(x.data_ptr(), out.data_ptr(), bytes);
}

void group_broadcast(Tensor x, int64_t src, int64_t id) { group(id).broadcast(x.data_ptr(), bytes_of(x, "broadcast"), src); }
void group_send(const Tensor& x, int64_t dst, int64_t id) { group(id).send(x.data_ptr(), bytes_of(x, "send"), dst); }
void group_recv(Tensor x, int64_t src, int64_t id) { group(id).recv(x.data_ptr(), bytes_of(x, "recv"), src); }
void group_barrier(int64_t id) { group(id).barrier(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def("group_bytes(int size) -> int");
  m.def("group_open(int fd, int rank, int size, float timeout, int[] peers) -> int");
  m.def("group_close(int group) -> ()");
  m.def("group_barrier(int group) -> ()");
  m.def("group_all_reduce(Tensor(a!) x, int group) -> ()");
  m.def("group_all_gather(Tensor x, Tensor(a!) out, int group) -> ()");
  m.def("group_broadcast(Tensor(a!) x, int src, int group) -> ()");
  m.def("group_send(Tensor x, int dst, int group) -> ()");
  m.def("group_recv(Tensor(a!) x, int src, int group) -> ()");
}

// No tensor says where these belong, so they answer for every key.
STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CompositeExplicitAutograd, m) {
  m.impl("group_bytes", TORCH_BOX(&group_bytes));
  m.impl("group_open", TORCH_BOX(&group_open));
  m.impl("group_close", TORCH_BOX(&group_close));
  m.impl("group_barrier", TORCH_BOX(&group_barrier));
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("group_all_reduce", TORCH_BOX(&group_all_reduce));
  m.impl("group_all_gather", TORCH_BOX(&group_all_gather));
  m.impl("group_broadcast", TORCH_BOX(&group_broadcast));
  m.impl("group_send", TORCH_BOX(&group_send));
  m.impl("group_recv", TORCH_BOX(&group_recv));
}

}  // namespace sglang_xeon
