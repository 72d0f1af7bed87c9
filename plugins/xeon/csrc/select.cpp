#include "select.h"

#include <algorithm>
#include <functional>

namespace sglang_xeon {

float kth_largest(float* x, int64_t count, int64_t k) {
  std::nth_element(x, x + k - 1, x + count, std::greater<float>());
  return x[k - 1];
}

void sort_descending(float* x, int64_t count) { std::sort(x, x + count, std::greater<float>()); }

}  // namespace sglang_xeon
