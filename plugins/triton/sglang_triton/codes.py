"""float8_e4m3fn and int8 codes from float32 and back, by integer arithmetic.

So they are the same on a device without the type (sm_80, and gfx942, whose own e4m3 is another one), under the interpreter, whose
casts round ties up, and in torch, bit for bit. Kernels take tensors of codes as uint8. Products of fp8 on devices that
have them take the type itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.numerics import INTERPRETED


@triton.jit
def encode_e4m3(x, SATFINITE: tl.constexpr = False):
    """x: float32 -> uint8 codes of float8_e4m3fn: to the nearest, a tie to the even code, saturated at 448; NaN stays NaN.

    SATFINITE: the device has an instruction for that, `cvt.rn.satfinite.e4m3x2` of sm_89 and later. It gives every NaN the sign +.
    """
    if SATFINITE and not INTERPRETED:
        made = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        size = tl.minimum(tl.abs(x), 448.0)
        size_bits = size.to(tl.uint32, bitcast=True)
        # 4 exponent bits and 3 of the mantissa remain of 8 and 23; the bias is 7 and not 127.
        normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 codes count 2^-9: adding 2^14 leaves that many in the lowest bits, rounded.
        small = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(size < 0.015625, small, normal)
        made = (tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)
    return made


@triton.jit
def decode_e4m3(code):
    """code: uint8 of float8_e4m3fn -> float32."""
    wide = code.to(tl.uint32)
    size = wide & 0x7F
    normal = ((size + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(wide >= 0x80, -value, value)


@triton.jit
def encode_int8(x):
    """x: float32 -> int8 in +-127: to the nearest, a tie to the even one."""
    # The lowest bits of the sum are the integer, in two's complement: no conversion, of which there are few a cycle.
    return (tl.minimum(tl.maximum(x, -127.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def encode_e2m1(x):
    """x: float32 -> int32 codes in 0..15, a sign and 0, 0.5, 1, 1.5, 2, 3, 4, 6: to the nearest, a tie to the even code, saturated."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    return code + (size > 5.0).to(tl.int32) + 8 * (x < 0).to(tl.int32)


@triton.jit
def decode_e2m1(code):
    """code: int32 in 0..15 -> float32. In the place of float32's lowest exponents it is the number, over 2^126: a subnormal there as here."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def encode_e8m0(most):
    """most: float32, not negative, the largest of a group -> uint8: its exponent less 2, that of the largest e2m1."""
    exponent = (most.to(tl.uint32, bitcast=True) >> 23).to(tl.int32)
    return tl.maximum(exponent - 2, 0).to(tl.uint8)


@triton.jit
def decode_e8m0(code):
    """code: uint8 -> float32, 2 ** (code - 127); 255 is NaN."""
    bits = tl.where(code == 0, 1 << 22, tl.where(code == 255, 0x7FC00000, code.to(tl.int32) << 23))
    return bits.to(tl.float32, bitcast=True)
