"""Pairs of four-bit codes, as they lie in bytes, become numbers that dots take."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.codes import decode_e2m1
from sglang_triton.numerics import INTERPRETED, rounded

# Four bytes become 2 x 4 numbers, two a register. A code under the exponent of 2^7 is 128 + code, exact in bfloat16, of which 128 + zero
# is taken: one multiply-add for two, where a conversion of each integer would take eight cycles' lanes. $4: bytes, $5 and $6: -(128 + zero), the same for all.
HALVES = """
{
.reg .b32 high, t, magic, one;
mov.b32 magic, 0x43;
mov.b32 one, 0x3F803F80;
shr.b32 high, $4, 4;
prmt.b32 t, $4, magic, 0x4140;
and.b32 t, t, 0xFF0FFF0F;
fma.rn.bf16x2 $0, t, one, $5;
prmt.b32 t, $4, magic, 0x4342;
and.b32 t, t, 0xFF0FFF0F;
fma.rn.bf16x2 $1, t, one, $6;
prmt.b32 t, high, magic, 0x4140;
and.b32 t, t, 0xFF0FFF0F;
fma.rn.bf16x2 $2, t, one, $5;
prmt.b32 t, high, magic, 0x4342;
and.b32 t, t, 0xFF0FFF0F;
fma.rn.bf16x2 $3, t, one, $6;
}
"""
_ASM = tl.constexpr(HALVES)


@triton.jit
def numbers_of(pair, zero, dtype: tl.constexpr, ELEMENT: tl.constexpr, PTX: tl.constexpr):
    """pair: uint8[.., k, n], zero: int32[.., n] -> the low and the high codes' numbers before they are scaled, [.., k, n] each, exact in any float dtype."""
    zero = tl.expand_dims(zero, len(pair.shape) - 2)
    if ELEMENT == "e2m1":
        wide = pair.to(tl.int32)
        low, high = rounded(decode_e2m1(wide & 15), dtype), rounded(decode_e2m1(wide >> 4), dtype)
    elif PTX and dtype == tl.bfloat16 and not INTERPRETED:
        low, high = tl.inline_asm_elementwise(
            _ASM,
            "=r,=r,=r,=r,r,r,r",
            [pair, (-128 - zero).to(tl.float32).to(tl.bfloat16)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        # As above: under the exponent of 2^23, and of 2^19 where a code lies four bits higher. No shift, and no conversion.
        wide = pair.to(tl.int32)
        low = ((wide & 15) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608 + zero).to(tl.float32)
        high = ((wide & 240) | 0x49000000).to(tl.float32, bitcast=True) - (524288 + zero).to(tl.float32)
        low, high = rounded(low, dtype), rounded(high, dtype)
    return low, high
