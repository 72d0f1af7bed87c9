// A tape: kernels that ran while it recorded, with the arguments they had, to be run again without Python or torch between them.
// sglang_xeon/step_graph.py says when that is allowed.
#pragma once

#include "isa.h"

namespace sglang_xeon {

// What kernels() gives at this level: `level` itself or, while this thread records, a table whose kernels note what they ran.
const Kernels& noted_kernels(const Kernels& level);

// While this thread records: memory of at least `bytes` that stays after the tensor in it has died, for a replay writes there
// again, and what the tensor's deleter gives to `give_back`, so that a later output of a recording may have it. Nulls where it does not.
struct Recorded {
  void* data;
  void* lease;
};
Recorded recorded_memory(size_t bytes);
void give_back(void* lease);

// What an op says that did more than its kernels: made a copy of an operand, or filled an output itself.
void cannot_replay(const char* why);

}  // namespace sglang_xeon
