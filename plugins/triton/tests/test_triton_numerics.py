"""What the interpreter gets wrong by itself, and kernels must not."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from sglang_triton.numerics import dot, rounded, tanh, widen


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
    """The steps of `numerics.divided` as a device takes them, in float64, where a remainder is exact: the interpreter divides instead."""

    def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) * b + c).astype(np.float32)

    draw = np.random.default_rng(0)
    x = (draw.standard_normal(1_000_000) * 10.0 ** draw.uniform(-6, 6, 1_000_000)).astype(np.float32)
    d = (draw.uniform(1, 2, 1_000_000) * 2.0 ** draw.integers(-16, 17, 1_000_000)).astype(np.float32)
    d[:1000] = np.nextafter(np.float32(2), np.float32(0))  # the worst to take a reciprocal of
    by = np.float32(1) / d
    near = x * by
    near = multiply_add(multiply_add(-near, d, x), by, near)
    assert np.array_equal(multiply_add(multiply_add(-near, d, x), by, near), x / d)
