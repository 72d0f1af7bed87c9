"""Activations quantised where they are made are what `gemm.linear` would have quantised: products have the same bits."""

from __future__ import annotations

import pytest
import torch

from sglang_core.ops.activation import gated, gated_quant
from sglang_core.ops.codes import CODE_KINDS, coded, decoded
from sglang_core.ops.formats import Fmt
from sglang_core.ops.gemm import dense, linear
from sglang_core.ops.norm import add_rms_norm, add_rms_norm_quant
from sglang_core.ops.quant import quantize, quantized_activations

FORMATS = ["fp8.tensor", "fp8.token_channel", "fp8.block128", "int8.token_channel", "w4a8_fp8.g128"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("width", [256, 200, 96])
def test_a_product_of_codes_has_the_bits_of_that_of_what_they_are_codes_of(
    width: int, fmt: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, w, bias = torch.randn(5, width).to(dtype), quantize(torch.randn(40, width), fmt), torch.randn(40).to(dtype)
    codes = coded(x, Fmt.parse(fmt).activation)  # type: ignore[arg-type]
    y = linear(codes, w, bias)
    assert (y.dtype, codes.shape) == (dtype, x.shape)
    assert torch.equal(y, linear(x, w, bias))
    assert torch.equal(decoded(codes), quantized_activations(x, Fmt.parse(fmt)))


@pytest.mark.parametrize("fmt", ["dense", "int4.awq.g128", "int8.token_channel.asym", "fp8.tensor.static"])
def test_weights_that_quantise_otherwise_take_no_codes(fmt: str) -> None:
    w = torch.randn(8, 128)
    packed = dense(w) if fmt == "dense" else quantize(w, fmt, x_scale=torch.ones(1))
    with pytest.raises(AssertionError, match=f"a weight in {fmt} does not quantise activations so"):
        linear(coded(torch.randn(2, 128), "int8"), packed)


@pytest.mark.parametrize("kind", CODE_KINDS)
def test_the_composites_are_their_parts(kind: str) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(4, 96).bfloat16(), torch.randn(4, 96).bfloat16(), torch.randn(96)
    codes, total = add_rms_norm_quant(x, residual, weight, 1e-6, kind)  # type: ignore[arg-type]
    y, want = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, want)
    for got, part in ((codes, y), (gated_quant(x, "silu", kind), gated(x, "silu"))):  # type: ignore[arg-type]
        parts = coded(part, kind)  # type: ignore[arg-type]
        assert torch.equal(got.code.view(torch.uint8), parts.code.view(torch.uint8))
        assert torch.equal(got.scale, parts.scale) and got.dtype == torch.bfloat16
