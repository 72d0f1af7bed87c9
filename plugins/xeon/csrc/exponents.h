// bfloat16 in 12 bits of 16, and none lost: the upper bytes of a weight's numbers (sign and seven bits of the exponent) take few
// values, so four bits tell which of the fifteen commonest of a panel it is. A kernel that reads memory is that much faster, and
// decoding costs a byte shuffle and two unpackings for 64 weights, less than their products. The numbers whose upper byte is rarer, some three
// in ten thousand normal ones, are zeros among the codes, and in a list of their own. That exponents compress so is the observation of
// Zhang et al., "70% Size, 100% Accuracy" (DFloat11, 2025), who use Huffman codes.
#pragma once

#include "isa.h"

namespace sglang_xeon {

// A unit has 8 k of 16 columns, 192 bytes: the lower bytes of k 0 .. 3, those of k 4 .. 7, and a nibble of code each: of k 0 .. 3 the
// low ones. The 64 bytes of 4 k are in the order that unpacking them with their upper bytes makes pairs for 16 columns of.
struct Place {
  int64_t column, k;
};
static constexpr Place place_of(int64_t i) {
  int64_t lane = i / 16, byte = i % 16;
  return {4 * lane + byte % 8 / 2, byte / 8 * 2 + byte % 2};
}

inline constexpr int64_t kCodes = 16;  // of a panel's table; the upper byte of code 0 is 0
inline constexpr int64_t kHalfUnit = 64;

// A number that has no code: in the place (k, column) of its panel there is a zero.
struct Escape {
  int32_t k;
  uint16_t column, value;
};
static_assert(sizeof(Escape) == 8, "as weights.py counts");

}  // namespace sglang_xeon
