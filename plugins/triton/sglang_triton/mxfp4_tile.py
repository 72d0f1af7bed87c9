"""One tile of a product of bfloat16 rows with mxfp4 weights, scaled as they are decoded, so that a step along K has several groups.

A number of e2m1 times a power of two is a bfloat16, a subnormal too (infinite from 2^128 on, as in float32): sums are then those of dense
weights. Weights are the product's left side, which tensor cores take from registers: decoded, they are four times their
codes, and would pass through shared memory twice. For that each thread must hold what it multiplies. So the columns of both sides
are taken in an order in which that is what lies side by side in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.codes import decode_e2m1, decode_e8m0
from sglang_triton.numerics import INTERPRETED, dot, rounded

GROUP = tl.constexpr(32)
LANES = tl.constexpr(4)  # threads that share a row of the left side
# Eight codes become 4 x 2 numbers: a register has those of one place in both halves of $4, which are the codes of four columns each. A code that is repeated
# six and twelve bits higher (times 0x1040) has its size in a bfloat16's lowest exponents, where it is the number over 2^126, a subnormal there as here, and its
# sign at the sign. Products of bfloat16 keep subnormals: their instruction knows no flushing. $5 and $6 are factors whose product is 2^126 times the scale, up to 2^253: one alone would overflow.
SCALED = """
{
.reg .b32 high, t, zero;
mov.b32 zero, 0x80008000;
shr.b32 high, $4, 8;
and.b32 t, $4, 0x000F000F;
mul.lo.u32 t, t, 0x1040;
and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 t, t, $5, zero;
fma.rn.bf16x2 $0, t, $6, zero;
and.b32 t, $4, 0x00F000F0;
mul.lo.u32 t, t, 0x104;
and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 t, t, $5, zero;
fma.rn.bf16x2 $1, t, $6, zero;
and.b32 t, high, 0x000F000F;
mul.lo.u32 t, t, 0x1040;
and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 t, t, $5, zero;
fma.rn.bf16x2 $2, t, $6, zero;
and.b32 t, high, 0x00F000F0;
mul.lo.u32 t, t, 0x104;
and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 t, t, $5, zero;
fma.rn.bf16x2 $3, t, $6, zero;
}
"""
_ASM = tl.constexpr(SCALED)


@triton.jit
def product_of_scaled(
    x_row,
    w_row,
    w_scale,
    K: tl.constexpr,
    WARP_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Pointers to BLOCK_T rows of x, bfloat16[K], to BLOCK_N rows of codes, uint8[K / 2], and of their scales -> float32[BLOCK_T, BLOCK_N].

    K: a multiple of 4; rows of codes begin at even addresses. WARP_GROUPS: whether products are of four warps together, as from Hopper on.
    """
    x_row, w_row, w_scale = x_row[:, None], w_row.to(tl.pointer_type(tl.uint16))[:, None], w_scale[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    WHOLE: tl.constexpr = K // BLOCK_K * BLOCK_K
    for start in range(0, WHOLE, BLOCK_K):
        total = _step(x_row, w_row, w_scale, total, start, K, False, WARP_GROUPS, BLOCK_T, BLOCK_N, BLOCK_K)
    if WHOLE < K:
        total = _step(x_row, w_row, w_scale, total, WHOLE, K, True, WARP_GROUPS, BLOCK_T, BLOCK_N, BLOCK_K)
    return tl.trans(total)


@triton.jit
def _step(
    x_row,
    w_row,
    w_scale,
    total,
    start,
    K: tl.constexpr,
    RAGGED: tl.constexpr,
    WARP_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """total: float32[BLOCK_N, BLOCK_T], and BLOCK_K columns from `start` on, of which there are fewer if RAGGED."""
    inner = start + tl.arange(0, BLOCK_K)
    word = start // 4 + tl.arange(0, BLOCK_K // 4)
    group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
    if RAGGED:
        a = tl.load(x_row + inner[None, :], (inner < K)[None, :], other=0)
        codes = tl.load(w_row + word[None, :], (word < K // 4)[None, :], other=0)
        scale = tl.load(w_scale + group[None, :], (group * GROUP < K)[None, :], other=0)
    else:
        a = tl.load(x_row + inner[None, :])
        codes = tl.load(w_row + word[None, :])
        scale = tl.load(w_scale + group[None, :])
    b = numbers_of(codes, scale)
    return dot(by_lanes(b, WARP_GROUPS), tl.trans(by_lanes(a, WARP_GROUPS)), total)


@triton.jit
def by_lanes(x, WARP_GROUPS: tl.constexpr):
    """x: [m, k] -> its columns in the order of tensor cores, where natural order is of threads, each with k / 4 side by side.

    Of eight columns the first and the fifth are a register, as `SCALED` makes them. Products of warp groups take two registers of
    each thread a time, and those of one warp are given four.
    """
    EIGHTS: tl.constexpr = x.shape[1] // LANES // 8
    y = tl.reshape(x, [x.shape[0], LANES, EIGHTS, 2, 2, 2])
    if WARP_GROUPS:
        y = tl.permute(y, [0, 4, 5, 2, 1, 3])
    else:
        y = tl.permute(y, [0, 2, 1, 4, 5, 3])
    return tl.reshape(y, x.shape)


@triton.jit
def numbers_of(codes, scale):
    """codes: uint16[n, k / 4], scale: uint8[n, k / 32] -> bfloat16[n, k], the weights."""
    if INTERPRETED:
        by = _along(decode_e8m0(scale), codes.shape[1])
        wide = codes.to(tl.int32)
        first = rounded(decode_e2m1(wide & 15) * by, tl.bfloat16)
        second = rounded(decode_e2m1((wide >> 4) & 15) * by, tl.bfloat16)
        third = rounded(decode_e2m1((wide >> 8) & 15) * by, tl.bfloat16)
        fourth = rounded(decode_e2m1(wide >> 12) * by, tl.bfloat16)
    else:
        some, rest = factors(scale)
        first, second, third, fourth = tl.inline_asm_elementwise(
            _ASM,
            "=r,=r,=r,=r,r,r,r",
            [codes, _along(some, codes.shape[1]), _along(rest, codes.shape[1])],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    each = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(each, [codes.shape[0], 4 * codes.shape[1]])


@triton.jit
def factors(scale):
    """scale: uint8 of e8m0 -> two of bfloat16 whose product is 2 ** (scale - 1), of about the same size; 255 gives a NaN."""
    wide = scale.to(tl.int32)
    some = ((wide >> 1) + 127) << 7
    rest = tl.where(wide == 255, 0x7FC0, (((wide + 1) >> 1) + 126) << 7)
    return some.to(tl.int16).to(tl.bfloat16, bitcast=True), rest.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _along(x, WORDS: tl.constexpr):
    """x: [n, groups] -> [n, WORDS], each as often as its group has words."""
    EACH: tl.constexpr = WORDS // x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, :, None], [x.shape[0], x.shape[1], EACH]), [x.shape[0], WORDS])
