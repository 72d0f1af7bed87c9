from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sglang_core.ops.norm import add_rms_norm, layer_norm, rms_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 64), (1, 1), (0, 8), (5, 4, 33)]


def ulps(dtype: torch.dtype) -> float:
    """One rounding of a value near 1, or what the order of sums changes."""
    return max(torch.finfo(dtype).eps, {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    want = F.rms_norm(x.double(), shape[-1:], w.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, w, 1e-5).double(), want, atol=ulps(dtype), rtol=ulps(dtype))


def test_rms_keeps_the_low_bits_of_a_float32_weight() -> None:
    x, w = torch.randn(4, 64).bfloat16(), 1 + 1e-3 * torch.randn(64)
    want = F.rms_norm(x.double(), (64,), w.double(), 1e-6).bfloat16()
    assert rms_norm(x, w, 1e-6).dtype == torch.bfloat16
    assert (rms_norm(x, w, 1e-6) == want).float().mean() > 0.99
    assert (rms_norm(x, w.bfloat16(), 1e-6) == want).float().mean() < 0.99


def test_rms_of_large_half_values_does_not_overflow() -> None:
    x = torch.full((2, 64), 3e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(64).half(), 1e-6), torch.ones(2, 64).half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_layer(dtype: torch.dtype, bias: bool) -> None:
    x, w, b = (torch.randn(5, 48) * 2 + 7).to(dtype), torch.randn(48).to(dtype), torch.randn(48).to(dtype)
    want = F.layer_norm(x.double(), (48,), w.double(), b.double() if bias else None, 1e-5)
    got = layer_norm(x, w, b if bias else None, 1e-5).double()
    torch.testing.assert_close(got, want, atol=4 * ulps(dtype), rtol=ulps(dtype))


def test_add_rms_normalises_the_rounded_sum() -> None:
    x, residual, w = (torch.randn(n).bfloat16() for n in ((7, 32), (7, 32), (32,)))
    y, total = add_rms_norm(x, residual, w, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, w, 1e-6))


def test_add_rms_calls_the_norm_it_is_given() -> None:
    y, _ = add_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.0, rms=lambda x, w, eps: x * 10)
    assert torch.equal(y, torch.full((1, 2), 20.0))
