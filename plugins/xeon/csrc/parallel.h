// Threads and scratch memory, shared by all ISA levels. Plain functions, so that no template is instantiated under a
// raised target and then picked by the linker for a CPU that lacks it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sglang_xeon {

using Task = void (*)(const void* args, int64_t index);

// Runs task(args, 0 .. count - 1) on torch's threads. Threads take the next index when they are free, so one that was
// slowed by a busy core holds the others up by one task at most.
void run_tasks(int64_t count, Task task, const void* args);

int64_t num_threads();

// This thread's buffer `slot`: 64-byte aligned, at least `bytes` long, contents undefined, valid until the next call with
// the same slot on the same thread.
enum Slot { kSlotActivations, kSlotTile, kSlotScores, kSlotKeys, kSlotValues, kSlotState, kSlotPartials, kNumSlots };
void* scratch(Slot slot, size_t bytes);

}  // namespace sglang_xeon
