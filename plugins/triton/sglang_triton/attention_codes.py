"""What a KV pool stores becomes what dots take."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.numerics import rounded, widen


@triton.jit
def numbers(x, dtype: tl.constexpr):
    """Stored floats, int8 codes, or fp8 codes as they are or as bytes -> the same numbers in dtype, scales aside."""
    if x.dtype == tl.uint8:
        half = half_of_e4m3(x)
        y = half if dtype == tl.float16 else rounded(widen(half), dtype)
    elif x.dtype == dtype:
        y = x
    elif x.dtype == tl.float8e4nv:
        y = x.to(dtype)
    else:
        y = rounded(widen(x), dtype)
    return y


@triton.jit
def half_of_e4m3(code):
    """uint8 of float8_e4m3fn -> float16, exact. Shifted into place, the exponent lacks 8 of its bias; subnormals come right, too."""
    bits = code.to(tl.uint16)
    y = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), y).to(tl.float16)
