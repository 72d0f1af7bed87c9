"""One tile of a product with a weight in any format, for linear layers and for experts.

Codes are multiplied exactly and sums are scaled: a group of columns at a time where weights have a scale a group, else at the end.
So no weight is rounded to the activations' dtype, and int8 codes are summed as integers. Of 4-bit weights, the low nibbles
meet the even columns of x, and the high ones the odd: nothing is put together again. mxfp4 weights and bfloat16 rows have a product of their
own on NVIDIA's devices (`mxfp4_tile`): there a weight times its scale is exact too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.codes import decode_e4m3, decode_e8m0
from sglang_triton.mxfp4_tile import product_of_scaled
from sglang_triton.nibbles import numbers_of
from sglang_triton.numerics import dot, rounded


@triton.jit
def product(
    x_row,
    x_scale,
    w_row,
    w_scale,
    zero,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Pointers to BLOCK_T rows of x and to BLOCK_N rows of w, and to each row's scales and zeros -> float32[BLOCK_T, BLOCK_N].

    x, as it is or codes: K columns; x_scale: float32, one or one a group; w: codes, two a byte if of four bits; w_scale: one
    every GROUP columns; zero: the same, uint8. All rows are read: callers point those that there
    are not at one that there is, and write nothing of them.
    """
    if ELEMENT == "e2m1" and PTX and K % 4 == 0 and x_row.dtype.element_ty == tl.bfloat16:
        # Devices with products of fp8 take those of warp groups, and the others lose little by their order.
        value = product_of_scaled(x_row, w_row, w_scale, K, NATIVE_FP8, BLOCK_T, BLOCK_N, BLOCK_K)
    else:
        value = product_by_group(
            x_row,
            x_scale,
            w_row,
            w_scale,
            zero,
            K,
            ELEMENT,
            GROUP,
            ACTIVATION,
            HAS_ZERO,
            NATIVE_FP8,
            PTX,
            BLOCK_T,
            BLOCK_N,
            GROUP if ELEMENT == "e2m1" else BLOCK_K,
        )
    return value


@triton.jit
def product_by_group(
    x_row,
    x_scale,
    w_row,
    w_scale,
    zero,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `product`, a step along K within one group."""
    x_row, w_row = x_row[:, None], w_row[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.int32 if ELEMENT == "int8" else tl.float32)
    w_by, x_by, offset = of_group(x_scale, w_scale, zero, 0, K, ELEMENT, GROUP, HAS_ZERO)
    for start in range(0, K, BLOCK_K):
        # A step ahead: loads as small as these are not copied before they are wanted, as tiles are.
        next_w_by, next_x_by, next_offset = of_group(
            x_scale, w_scale, zero, start + BLOCK_K, K, ELEMENT, GROUP, HAS_ZERO
        )
        inner = start + tl.arange(0, BLOCK_K)
        a = columns(x_row + inner[None, :], (inner < K)[None, :], K % BLOCK_K > 0)
        if ELEMENT == "int4" or ELEMENT == "e2m1":
            even, odd = tl.split(tl.reshape(a, [BLOCK_T, BLOCK_K // 2, 2]))
            byte = start // 2 + tl.arange(0, BLOCK_K // 2)
            pair = columns(w_row + byte[:, None], (byte < K // 2)[:, None], K % BLOCK_K > 0)
            low, high = numbers_of(pair, offset, even.dtype, ELEMENT, PTX)
            # Two sums, so that no product waits for the one before it.
            part = dot(even, low, tl.zeros([BLOCK_T, BLOCK_N], tl.float32))
            part += dot(odd, high, tl.zeros([BLOCK_T, BLOCK_N], tl.float32))
            if GROUP < K:
                part *= w_by[None, :]
            total += part
        else:
            b = columns(w_row + inner[:, None], (inner < K)[:, None], K % BLOCK_K > 0)
            if ELEMENT == "int8":
                total = tl.dot(a, b, total, out_dtype=tl.int32)
            elif ELEMENT == "fp8":
                part = fp8_product(a, b, NATIVE_FP8)
                if GROUP < K:
                    part *= w_by[None, :]
                    part *= x_by[:, None]
                total += part
            else:
                total = dot(a, b, total)
        w_by, x_by, offset = next_w_by, next_x_by, next_offset
    value = total.to(tl.float32)
    if ACTIVATION == "fp8" or ACTIVATION == "int8" or (ACTIVATION == "fp8_block" and GROUP >= K):
        value *= tl.load(x_scale)[:, None]
    if GROUP >= K and ELEMENT != "dense":
        value *= weight_scale(w_scale)[None, :]
    return value


@triton.jit
def of_group(
    x_scale, w_scale, zero, start, K: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr
):
    """Scales of both sides and zeros in the group of column `start`, or in the last one. What a format has not is not looked at."""
    group = tl.minimum(start, K - 1) // GROUP
    w_by, x_by = tl.zeros(w_scale.shape, tl.float32), tl.zeros(x_scale.shape, tl.float32)
    offset = tl.full(w_scale.shape, 8, tl.int32)
    if GROUP < K:
        w_by = weight_scale(w_scale + group)
        if ELEMENT == "fp8":
            x_by = tl.load(x_scale + group)
    if HAS_ZERO:
        offset = tl.load(zero + group).to(tl.int32)
    return w_by, x_by, offset


@triton.jit
def scale_rows(block, row, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of scales of a tile's rows int64[BLOCK_N] of a weight: int64[1] where they all have the same, and else as many."""
    if ROWS % BLOCK_N == 0:
        y = (block * BLOCK_N // ROWS + tl.arange(0, 1)).to(tl.int64)
    else:
        y = row // ROWS
    return y


@triton.jit
def columns(at, there, RAGGED: tl.constexpr):
    """Zeros where there is nothing. Without a mask where all is there: it would be worked out in each step."""
    if RAGGED:
        x = tl.load(at, there, other=0)
    else:
        x = tl.load(at)
    return x


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
def weight_scale(at):
    """float32, or of uint8 codes of e8m0: 2 ** (code - 127), 255 NaN."""
    raw = tl.load(at)
    if at.dtype.element_ty == tl.uint8:
        value = decode_e8m0(raw)
    else:
        value = raw
    return value
