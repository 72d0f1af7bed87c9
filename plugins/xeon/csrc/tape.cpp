// Tapes as torch ops. A tape and an arena are handles: addresses.

#include "tape.h"

#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "bindings.h"

namespace sglang_xeon {
namespace {

// Outputs of the recordings of one step function. Its steps run one after the other and write a block before they read it, so a
// block whose tensor died while a tape recorded serves the next output of this tape, and of the function's others. Another
// function's steps may run at the same time, and have their own. Tapes and tensors keep it.
class Arena {
 public:
  ~Arena() {
    for (Block& block : blocks_) std::free(block.data);
  }

  void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    Block* best = nullptr;
    for (Block& block : blocks_)
      if (block.free && block.bytes >= bytes && (!best || block.bytes < best->bytes)) best = &block;
    if (!best) {
      size_t rounded = (std::max<size_t>(bytes, 1) + 4095) / 4096 * 4096;
      void* data = std::aligned_alloc(64, rounded);
      if (data == nullptr) throw std::bad_alloc();
      blocks_.push_back({data, rounded, true});
      best = &blocks_.back();
    }
    best->free = false;
    return best->data;
  }

  void give_back(void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Block& block : blocks_)
      if (block.data == data) block.free = true;
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
    bool free;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;
};
using SharedArena = std::shared_ptr<Arena>;

struct Lease {
  SharedArena arena;
  void* data;
};

struct Tape {
  SharedArena arena;
  std::vector<std::function<void()>> calls;
  std::string refusal;
};

thread_local Tape* recording = nullptr;

thread_local const Kernels* noted_level = nullptr;

template <typename Args, void (*Kernels::*kKernel)(const Args&)>
void run_and_note(const Args& args) {
  auto run = noted_level->*kKernel;
  recording->calls.push_back([run, args] { run(args); });
  run(args);
}

// Only kernels whose arguments point at nothing that an op made for the one call.
Kernels noting(const Kernels& level) {
  Kernels table = level;
  table.linear = run_and_note<LinearArgs, &Kernels::linear>;
  table.attention = run_and_note<AttentionArgs, &Kernels::attention>;
  table.kv_write = run_and_note<KvWriteArgs, &Kernels::kv_write>;
  table.rope_write = run_and_note<RopeWriteArgs, &Kernels::rope_write>;
  table.norm = run_and_note<NormArgs, &Kernels::norm>;
  table.gated = run_and_note<GatedArgs, &Kernels::gated>;
  table.rope = run_and_note<RopeArgs, &Kernels::rope>;
  table.embed = run_and_note<EmbedArgs, &Kernels::embed>;
  table.layer_norm = run_and_note<LayerNormArgs, &Kernels::layer_norm>;
  table.route = run_and_note<RouteArgs, &Kernels::route>;
  table.experts = run_and_note<ExpertsArgs, &Kernels::experts>;
  return table;
}

Tape& tape_of(int64_t handle) { return *reinterpret_cast<Tape*>(handle); }

int64_t arena_new() { return reinterpret_cast<int64_t>(new SharedArena(std::make_shared<Arena>())); }

void arena_free(int64_t handle) { delete reinterpret_cast<SharedArena*>(handle); }

int64_t tape_new(int64_t arena) { return reinterpret_cast<int64_t>(new Tape{*reinterpret_cast<SharedArena*>(arena), {}, {}}); }

void tape_free(int64_t handle) { delete &tape_of(handle); }

// This thread's kernels are noted on the tape from now on; with 0, on none.
void tape_record(int64_t handle) { recording = handle ? &tape_of(handle) : nullptr; }

int64_t tape_length(int64_t handle) { return int64_t(tape_of(handle).calls.size()); }

std::string tape_refusal(int64_t handle) { return tape_of(handle).refusal; }

void tape_replay(int64_t handle) {
  for (const auto& call : tape_of(handle).calls) call();
}

}  // namespace

const Kernels& noted_kernels(const Kernels& level) {
  if (recording == nullptr) return level;
  static thread_local Kernels table;
  if (noted_level != &level) noted_level = &level, table = noting(level);
  return table;
}

Recorded recorded_memory(size_t bytes) {
  if (recording == nullptr) return {nullptr, nullptr};
  void* data = recording->arena->take(bytes);
  return {data, new Lease{recording->arena, data}};
}

void give_back(void* opaque) {
  std::unique_ptr<Lease> lease(static_cast<Lease*>(opaque));
  lease->arena->give_back(lease->data);
}

void cannot_replay(const char* why) {
  if (recording) recording->refusal = why;
}

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def("arena_new() -> int");
  m.def("arena_free(int arena) -> ()");
  m.def("tape_new(int arena) -> int");
  m.def("tape_free(int tape) -> ()");
  m.def("tape_record(int tape) -> ()");
  m.def("tape_length(int tape) -> int");
  m.def("tape_refusal(int tape) -> str");
  m.def("tape_replay(int tape) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CompositeExplicitAutograd, m) {
  m.impl("arena_new", TORCH_BOX(&arena_new));
  m.impl("arena_free", TORCH_BOX(&arena_free));
  m.impl("tape_new", TORCH_BOX(&tape_new));
  m.impl("tape_free", TORCH_BOX(&tape_free));
  m.impl("tape_record", TORCH_BOX(&tape_record));
  m.impl("tape_length", TORCH_BOX(&tape_length));
  m.impl("tape_refusal", TORCH_BOX(&tape_refusal));
  m.impl("tape_replay", TORCH_BOX(&tape_replay));
}

}  // namespace sglang_xeon
