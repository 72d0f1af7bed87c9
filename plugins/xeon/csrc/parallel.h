// Threads and scratch memory, shared by all ISA levels. Plain functions, so that no template is instantiated under a
// raised target and then picked by the linker for a CPU that lacks it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sglang_xeon {

using Task = void (*)(const void* args, int64_t index);

// Runs task(args, 0 .. count - 1) on the team. Threads take the next index when they are free, so one that was slowed by a busy
// core holds the others up by one task at most. Tasks must not throw and not run tasks themselves.
void run_tasks(int64_t count, Task task, const void* args);

// The same where what an index reads lies behind what the one before it does: a thread takes one after the other, and first those of
// a share of its own.
void run_stream(int64_t count, Task task, const void* args);

// Threads that run_tasks uses when called from this thread: those of pin_team, else as many as torch would use.
int64_t num_threads();
int64_t default_num_threads();

// From now on this thread computes with `count` threads: itself, and workers that are tied to cpus[1], cpus[2], ...
void pin_team(const int64_t* cpus, int64_t count);

// This thread's buffer `slot`: 64-byte aligned, at least `bytes` long, contents undefined, valid until the next call with
// the same slot on the same thread.
enum Slot {
  kSlotActivations, kSlotWideRow, kSlotWidened, kSlotTile, kSlotScores, kSlotKeys, kSlotValues, kSlotState, kSlotPartials,
  kSlotPlan, kSlotHidden, kSlotExperts, kNumSlots
};
void* scratch(Slot slot, size_t bytes);

}  // namespace sglang_xeon
