// Selection and sorting for all ISA levels, compiled for any CPU: see parallel.h for why.
#pragma once

#include <cstdint>

namespace sglang_xeon {

// The k-th largest of x[0, count), 1 <= k <= count; x is reordered. Holds no NaN.
float kth_largest(float* x, int64_t count, int64_t k);

void sort_descending(float* x, int64_t count);

}  // namespace sglang_xeon
