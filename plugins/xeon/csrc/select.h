// Sorting for all ISA levels, compiled for any CPU: see parallel.h for why.
#pragma once

#include <cstdint>

namespace sglang_xeon {

void sort_descending(float* x, int64_t count);

}  // namespace sglang_xeon
