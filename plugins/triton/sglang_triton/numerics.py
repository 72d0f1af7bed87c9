"""What kernels do with numbers so that they are right compiled and interpreted alike.

Triton's interpreter keeps bfloat16 as raw 16 bits: arithmetic on them is silently wrong, a dot of them is noise, subnormals
widen to other numbers, and float32 is cut off to bfloat16 and not rounded. Its float8 casts round ties up. So kernels
widen what they load, compute in float32, and round what they store, with the functions below; compiled, each is one cast.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from sglang_triton.tuning import interpreting

# A multiplication and an addition may be one instruction. It is so up to Triton 3.9, which warns that it will not stay so.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def widen(x):
    """x of any float dtype -> the same numbers in float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x: float32 -> dtype, to the nearest, a tie to the even one."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, near, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def dot(a, b, acc):
    """a: [m, k], b: [k, n] of one float dtype, acc: float32[m, n] -> acc + a b, summed in float32.

    float32 is multiplied as float32, never as TF32: a reference of seven digits asks for it.
    """
    if INTERPRETED:
        y = tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        y = tl.dot(a, b, acc, input_precision="ieee")
    return y


@triton.jit
def divided(x, d, by):
    """x / d of many x by one d, rounded once, as `tl.div_rn` where x is no smaller than 2^-100. d: of 2^-100 to 2^100; by: 1 / d, rounded once.

    A remainder that one multiply-add gives exactly corrects the quotient, twice (Markstein). A division by itself has a reciprocal and
    a branch for each element.
    """
    near = x * by
    y = tl.fma(tl.fma(-near, d, x), by, near)
    y = tl.fma(tl.fma(-y, d, x), by, y)
    return tl.where(tl.abs(near) < float("inf"), y, near)


@triton.jit
def quotient(x, d):
    """x / d of many x by few d, for `codes.encode_e4m3` and `encode_int8`: it has the code that the quotient of `tl.div_rn` has, whatever x, and whatever d that is not negative.

    That is `divided` with one correction, which is not the nearest everywhere. A code asks on which side of m, or on m, the nearest is, for an
    m between two codes: of up to 8 bits, from 2^-10 to 128. One correction is wrong by less than a unit of the last place, so only x within 4 units of m d are
    in question; for each of them, every significand of d and every m of 8 bits it answers right, as going through all 2^23 x 128 x 9
    showed. Other exponents are the same cases, as a power of two keeps d far from the ends of float32; x that vanishes by that is
    far below 2^-10 d.
    """
    size = tl.abs(d)
    scale = tl.where(size < 2.0**-60, 2.0**100, tl.where(size > 2.0**60, 2.0**-100, 1.0))
    x, d = x * scale, d * scale
    by = tl.div_rn(1.0, d)
    near = x * by
    y = tl.fma(tl.fma(near, d, -x), -by, near)  # so signed that -0 stays -0
    return tl.where(y == y, y, near)  # no remainder where one of them is infinite, or d is 0


@triton.jit
def sigmoid(x):
    """x: float32. Overflows nowhere."""
    z = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def softplus(x):
    """x: float32 -> log(1 + exp(x)), to some units of the last place: 1 + z has lost the digits of a small z, and log(1 + z) = 2 atanh(z / (2 + z)), a series."""
    z = tl.exp(-tl.abs(x))
    y = z / (2.0 + z)
    square = y * y
    series = 1.0 / 13 + square * (1.0 / 15)
    for i in tl.static_range(6):
        series = 1.0 / (11 - 2 * i) + square * series
    return tl.maximum(x, 0.0) + 2.0 * y * series


@triton.jit
def tanh(x):
    """x: float32, to some units of the last place: a series where 1 - exp(-2 |x|) would cancel."""
    near = tl.where(tl.abs(x) < 0.15, x, 0.0)
    square = near * near
    series = near * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    z = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - z) / (1.0 + z)
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -far, far))


@triton.jit
def nearest_integer(x):
    """x: float32 of a size below 2^22 -> the nearest integer, a tie to the even one: what is smaller than 1 falls off the sum's end."""
    return (x + 12582912.0) - 12582912.0
