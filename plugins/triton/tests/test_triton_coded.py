"""norm.add_rms_quant and act.gated_quant give what a linear layer would have quantised itself, and it takes them: bit for bit."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.activation import gated
from sglang_triton.coded import add_rms_norm_quant, gated_quant
from sglang_triton.gemm import linear
from sglang_triton.norm import add_rms_norm
from sglang_triton.quantize import quantise
from torch import Tensor

from sglang_core.api.ops import OPS, Codes

FORMATS = {"fp8": "fp8.token_channel", "fp8_block": "fp8.block128", "int8": "int8.token_channel"}
DTYPES = [torch.bfloat16, torch.float32]
EPS = 1e-6


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def check(codes: Codes, x: Tensor, kind: str) -> None:
    """Codes and scales are those of x, and so are the product and its bits."""
    code, scale = quantise(x, kind)
    assert torch.equal(codes.code.view(torch.uint8), code.view(torch.uint8))
    assert torch.equal(codes.scale, scale)
    assert codes.dtype == x.dtype
    w = OPS["quant.quantize"].body(torch.randn(48, x.shape[1]), FORMATS[kind])
    bias = torch.randn(48).to(x.dtype)
    assert torch.equal(linear(codes, w, bias), linear(x, w, bias))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(19, 256), (1, 384), (3, 96), (5, 1500)])
def test_norm(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), (5 * torch.randn(shape)).to(dtype)
    x[0] = residual[0] = 0.0  # a row of zeros has scale 1
    weight = torch.randn(shape[1])
    codes, total = add_rms_norm_quant(x, residual, weight, EPS, kind)
    y, want = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, want)
    check(codes, y, kind)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_gated(act: str, kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(7, 2 * 300 + 5).to(dtype)[:, 3:-2]  # a slice; three groups of columns, the last in part
    codes = gated_quant(x, act, kind)
    check(codes, gated(x, act), kind)


def test_no_rows() -> None:
    x = torch.empty(0, 256)
    codes, total = add_rms_norm_quant(x, x, torch.ones(256), EPS, "fp8_block")
    assert (codes.shape, codes.scale.shape, total.shape) == ((0, 256), (0, 2), (0, 256))
    assert gated_quant(x, "silu", "int8").shape == (0, 128)
