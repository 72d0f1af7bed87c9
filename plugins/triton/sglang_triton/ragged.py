"""Which req a row belongs to, where reqs lie one after the other: found on the device, so that a launch depends on shapes alone."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_up_to(cu, value, R, steps, EVERY: tl.constexpr, EACH: tl.constexpr):
    """How many r of [0, R) have cu[r + 1] // EVERY + (r + 1) * EACH of at most `value`: int32[...], or a scalar.

    By bisection; `steps` is R's number of bits. With EVERY = 1 and EACH = 0 it is the req of row `value`, R for a row of none.
    """
    low = value * 0
    high = low + R
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        end = tl.load(cu + middle + 1, open_, other=0) // EVERY + (middle + 1) * EACH
        right = open_ & (end <= value)
        low = tl.where(right, middle + 1, low)
        high = tl.where(open_ & (end > value), middle, high)
    return low
