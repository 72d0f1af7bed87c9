#include "select.h"

#include <algorithm>
#include <functional>

namespace sglang_xeon {

void sort_descending(float* x, int64_t count) { std::sort(x, x + count, std::greater<float>()); }

}  // namespace sglang_xeon
