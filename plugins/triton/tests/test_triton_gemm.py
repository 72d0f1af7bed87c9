"""gemm.linear in each quantised format against its op body, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.gemm import linear, linear_invariant
from sglang_triton.kernels import QUANTISED
from sglang_triton.quantize import quantise
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS, Fmt, PackedWeight
from sglang_core.ops import quant

pytestmark = pytest.mark.usefixtures("tiles")
SOME = ("fp8.block128", "fp8.token_channel", "int8.token_channel", "int4.awq.g64", "int4.pack.g-1", "mxfp4.g32")


def weight(fmt: str, rows: int, columns: int) -> PackedWeight:
    torch.manual_seed(0)
    return OPS["quant.quantize"].body(torch.randn(rows, columns), fmt)


@pytest.mark.parametrize("fmt", QUANTISED)
def test_formats(fmt: str) -> None:
    """Sizes that are no multiples of a tile or of a group, rows that lie apart, and a bias."""
    w, bias = weight(fmt, 70, 328), torch.randn(70)
    x = torch.randn(5, 340)[:, 12:]
    assert_close(linear(x, w, bias), OPS["gemm.linear"].body(x, w, bias), scale=20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", SOME)
def test_half_types_and_leading_dims(fmt: str, dtype: torch.dtype) -> None:
    w, x = weight(fmt, 40, 256), torch.randn(3, 2, 256).to(dtype)
    assert_close(linear(x, w), OPS["gemm.linear"].body(x, w), scale=20)


@pytest.mark.parametrize("fmt", SOME)
def test_many_rows(fmt: str) -> None:
    w, x = weight(fmt, 33, 128), torch.randn(70, 128)
    assert_close(linear(x, w), OPS["gemm.linear"].body(x, w), scale=20)
    assert linear(x[:0], w).shape == (0, 33)


@pytest.mark.parametrize("kind", ["fp8", "fp8_block", "int8"])
def test_activations_get_the_codes_of_the_definition(kind: str) -> None:
    """To the bit, a row of zeros and a ragged last group included."""
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 3
    x[2] = 0.0
    code, scale = quantise(x, kind)
    want, want_scale = quant.quantize_block(x) if kind == "fp8_block" else quant.quantize_token(x, kind)
    assert torch.equal(scale, want_scale)
    assert torch.equal(code.view(torch.uint8), want.view(torch.uint8))


def test_formats_that_are_claimed_are_ones_that_the_kernel_knows() -> None:
    for name in QUANTISED:
        fmt = Fmt.parse(name)
        assert fmt.activation in ("as_is", "fp8", "fp8_block", "int8") and not (
            fmt.act_order or fmt.static or fmt.is_dense
        )


@pytest.mark.parametrize("fmt", ["dense", "fp8.block128", "int4.awq.g64"])
def test_a_row_is_summed_alike_in_every_batch(fmt: str) -> None:
    w, x = weight(fmt, 40, 328), torch.randn(70, 328)
    together = linear_invariant(x, w)
    assert_close(together, OPS["gemm.linear"].body(x, w), scale=20)
    assert torch.equal(linear_invariant(x[3:4], w), together[3:4])
    assert torch.equal(linear_invariant(x[60:], w), together[60:])
