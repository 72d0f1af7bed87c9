"""One tile of a product with a weight in any format, for linear layers and for experts.

Codes are multiplied exactly and sums are scaled: a group of columns at a time where weights have a scale a group, else at the end.
So no weight is rounded to the activations' dtype, and int8 codes are summed as integers. Of 4-bit weights, the low nibbles
meet the even columns of x, and the high ones the odd: nothing is put together again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.codes import decode_e2m1, decode_e4m3, decode_e8m0
from sglang_triton.numerics import dot, rounded


@triton.jit
def product(
    x_row,
    x_scale,
    in_x,
    w_row,
    w_scale,
    zero,
    in_w,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Pointers to BLOCK_T rows of x and to BLOCK_N rows of w, and to each row's scales and zeros -> float32[BLOCK_T, BLOCK_N].

    x, as it is or codes: K columns; x_scale: float32, one or one a group; w: codes, two a byte if of four bits; w_scale: one
    every GROUP columns; zero: the same, uint8. A step along K is within one group. in_x, in_w: which rows there are.
    """
    x_row, w_row = x_row[:, None], w_row[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.int32 if ELEMENT == "int8" else tl.float32)
    for start in range(0, K, BLOCK_K):
        if ELEMENT == "int4" or ELEMENT == "e2m1":
            byte = start // 2 + tl.arange(0, BLOCK_K // 2)
            there = byte < K // 2
            even = tl.load(x_row + 2 * byte[None, :], in_x[:, None] & there[None, :], other=0.0)
            odd = tl.load(x_row + 2 * byte[None, :] + 1, in_x[:, None] & there[None, :], other=0.0)
            pair = tl.load(w_row + byte[:, None], in_w[None, :] & there[:, None], other=0).to(tl.int32)
            offset = tl.full([BLOCK_N], 8, tl.int32)
            if HAS_ZERO:
                offset = tl.load(zero + start // GROUP, in_w, other=0).to(tl.int32)
            part = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            part = dot(even, four_bits(pair & 15, offset, even.dtype, ELEMENT), part)
            part = dot(odd, four_bits(pair >> 4, offset, odd.dtype, ELEMENT), part)
            if GROUP < K:
                part *= weight_scale(w_scale + start // GROUP, in_w)[None, :]
            total += part
        else:
            inner = start + tl.arange(0, BLOCK_K)
            a = tl.load(x_row + inner[None, :], in_x[:, None] & (inner < K)[None, :], other=0)
            b = tl.load(w_row + inner[:, None], in_w[None, :] & (inner < K)[:, None], other=0)
            if ELEMENT == "int8":
                total = tl.dot(a, b, total, out_dtype=tl.int32)
            elif ELEMENT == "fp8":
                part = fp8_product(a, b, NATIVE_FP8)
                if GROUP < K:
                    part *= weight_scale(w_scale + start // GROUP, in_w)[None, :]
                    part *= tl.load(x_scale + start // GROUP, in_x, other=0.0)[:, None]
                total += part
            else:
                total = dot(a, b, total)
    value = total.to(tl.float32)
    if ACTIVATION == "fp8" or ACTIVATION == "int8" or (ACTIVATION == "fp8_block" and GROUP >= K):
        value *= tl.load(x_scale, in_x, other=0.0)[:, None]
    if GROUP >= K and ELEMENT != "dense":
        value *= weight_scale(w_scale, in_w)[None, :]
    return value


@triton.jit
def fp8_product(a, b, NATIVE: tl.constexpr):
    """a: uint8[m, k], b: uint8[k, n], codes of e4m3fn -> float32[m, n]. Every code is a bfloat16 too.

    Each product is a sum of its own: tensor cores keep fewer than 24 bits of a running one.
    """
    if NATIVE:
        y = tl.dot(a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True))
    else:
        zeros = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
        y = dot(rounded(decode_e4m3(a), tl.bfloat16), rounded(decode_e4m3(b), tl.bfloat16), zeros)
    return y


@triton.jit
def four_bits(code, offset, dtype: tl.constexpr, ELEMENT: tl.constexpr):
    """code: int32[k, n] in 0..15, offset: int32[n] -> what it stands for before it is scaled, exact in any float dtype."""
    if ELEMENT == "e2m1":
        value = decode_e2m1(code)
    else:
        value = (code - offset[None, :]).to(tl.float32)
    return rounded(value, dtype)


@triton.jit
def weight_scale(at, there):
    """float32, or of uint8 codes of e8m0: 2 ** (code - 127), 255 NaN."""
    raw = tl.load(at, there, other=0)
    if at.dtype.element_ty == tl.uint8:
        value = decode_e8m0(raw)
    else:
        value = raw
    return value
