"""What the interpreter gets wrong by itself, and kernels must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from sglang_triton.codes import encode_e4m3, encode_int8
from sglang_triton.numerics import divided, dot, quotient, rounded, tanh, widen


@triton.jit
def _convert(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, rounded(widen(tl.load(x + at)), y.dtype.element_ty))


@triton.jit
def _tanh(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tanh(tl.load(x + at)))


@triton.jit
def _product(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, dot(tl.load(a + at), tl.load(b + at), tl.zeros([N, N], tl.float32)))


@triton.jit
def _divide(x, d, by, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, divided(tl.load(x + at), tl.load(d + at), tl.load(by + at)))


@triton.jit
def _codes(x, d, made, want, INT8: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    value, step = tl.load(x + at), tl.load(d + at)
    quick, exact = quotient(value, step), tl.div_rn(value, step)
    if INT8:
        tl.store(made + at, encode_int8(quick).to(tl.uint8, bitcast=True))
        tl.store(want + at, encode_int8(exact).to(tl.uint8, bitcast=True))
    else:
        tl.store(made + at, encode_e4m3(quick))
        tl.store(want + at, encode_e4m3(exact))


def test_float32_is_rounded_to_bfloat16_as_torch_does() -> None:
    """Ties, both infinities, NaN, subnormals and what rounds up to infinity."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[:8] = torch.tensor([0x3F808000, 0x3F818000, 0x7F800000, -0x800000, 0x7FC00001, 0x00018000, 0x7F7FFFFF, 0])
    x = bits.view(torch.float32)
    y = torch.empty(4096, dtype=torch.bfloat16)
    _convert[(1,)](x, y, N=4096)
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_every_bfloat16_widens_to_itself() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    y = torch.empty(2**16)
    _convert[(1,)](x, y, N=2**16)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


def test_products_of_bfloat16() -> None:
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    c = torch.empty(32, 32)
    _product[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_tanh_near_zero_and_far() -> None:
    x = torch.cat([torch.linspace(-0.3, 0.3, 2047), torch.linspace(-90.0, 90.0, 2048), torch.tensor([0.0])])
    y = torch.empty_like(x)
    _tanh[(1,)](x, y, N=4096)
    torch.testing.assert_close(y, x.tanh(), rtol=1e-6, atol=0)


def test_a_quotient_by_multiply_adds_is_the_nearest() -> None:
    draw = np.random.default_rng(0)
    x = (draw.standard_normal(1 << 18) * 10.0 ** draw.uniform(-6, 6, 1 << 18)).astype(np.float32)
    d = (draw.uniform(1, 2, 1 << 18) * 2.0 ** draw.integers(-16, 17, 1 << 18)).astype(np.float32)
    d[:1000] = np.nextafter(np.float32(2), np.float32(0))  # the worst to take a reciprocal of
    y = torch.empty(1 << 18)
    _divide[(1,)](torch.from_numpy(x), torch.from_numpy(d), torch.from_numpy(np.float32(1) / d), y, N=1 << 18)
    assert np.array_equal(y.numpy(), x / d)


def next_to(x: np.ndarray, units: int) -> np.ndarray:
    """x: float32, positive and finite -> the numbers up to so many units away: [2 units + 1, n]."""
    return (x.view(np.int32) + np.arange(-units, units + 1, dtype=np.int32)[:, None]).view(np.float32)


def hard_divisors() -> np.ndarray:
    """Significands of float32: where other ways to divide were seen to fail, such that m d lies close to a midpoint of float32, and any."""
    steps = np.arange(8, 16)[:, None] * 2**20 + np.array([-3, -1, 0, 1, 3])
    draw = np.random.default_rng(1).integers(2**23, 2**24, 120)
    seen = np.array([0x1FFFFFE, 0x17BFFFE, 0x1D7FFFE]) // 2
    return (np.concatenate([seen, steps.ravel(), draw]) / 2.0**23).astype(np.float32)


@pytest.mark.parametrize("exponent", [0, -3, -60, -61, -100, -126, 59, 61, 118])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_codes_of_quotients_are_those_of_divisions(kind: str, exponent: int) -> None:
    """Next to every number halfway between two codes, where a quotient's last bit decides, or a tie."""
    code = np.arange(126, dtype=np.uint8)
    if kind == "fp8":
        exact = torch.from_numpy(np.append(code, 126).astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    else:
        exact = np.arange(127, dtype=np.float32)
    half = (exact[1:] + exact[:-1]) / 2
    d = hard_divisors() * np.float32(2.0**exponent)
    near = next_to((half[:, None] * d).ravel(), 4)
    check_codes(near, np.broadcast_to(np.tile(d, len(half)), near.shape), kind)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_codes_of_quotients_at_the_ends_of_float32(kind: str) -> None:
    """Zeros, infinities, NaN, the smallest and the largest; rows that are all subnormal."""
    ends = np.array([0, 1, 3, 0x400000, 0x7FFFFF, 0x800000, 0x1000000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], np.uint32)
    draw = np.random.default_rng(2).integers(0, 0x7F800000, 200, dtype=np.uint32)
    tiny = np.arange(1, 90, dtype=np.uint32)
    d = np.concatenate([ends, draw, tiny]).view(np.float32)
    x = np.concatenate([ends, draw, tiny * 77]).view(np.float32)
    check_codes(*np.meshgrid(np.concatenate([x, -x]), d), kind)


def check_codes(x: np.ndarray, d: np.ndarray, kind: str) -> None:
    x, d = (np.append(v.ravel(), np.ones(-v.size % 4096, np.float32)) for v in (x, d))
    made, want = torch.empty(2, len(x), dtype=torch.uint8)
    _codes[(len(x) // 4096,)](torch.from_numpy(x), torch.from_numpy(d), made, want, INT8=kind == "int8", N=4096)
    differs = made != want
    if kind == "fp8":
        differs &= (made & want & 0x7F) != 0x7F  # NaN has a sign that nobody looks at
    assert not differs.any(), [(x[i], d[i], made[i], want[i]) for i in differs.nonzero().ravel()[:5]]
