"""Linear layers by PyTorch's scaled products: results on the host's body of them, and what a GPU's takes by its own checks on meta tensors."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.gpu import linear
from sglang_triton.quantize import quantise
from torch import Tensor
from torch.nn.functional import ScalingType

from sglang_core.api.ops import OPS, Codes, PackedWeight

BF16 = {"rtol": 2**-7, "atol": 2e-2}  # one rounding to bfloat16, of sums near 1


def weight(fmt: str, rows: int, columns: int, x_scale: float = 0.02) -> PackedWeight:
    torch.manual_seed(0)
    given = torch.tensor([x_scale]) if fmt.endswith("static") else None
    return OPS["quant.quantize"].body(torch.randn(rows, columns), fmt, x_scale=given)


def codes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")


def scales(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("fmt", "kernel"),
    [
        ("fp8.tensor", linear.row_scaled),
        ("fp8.token_channel", linear.row_scaled),
        ("fp8.tensor.static", linear.static_scaled),
    ],
)
def test_rows(fmt: str, kernel: object) -> None:
    """A bias, rows that lie apart, one of zeros and one past what a static scale reaches; leading dims; no rows."""
    w, bias = weight(fmt, 48, 64), torch.randn(48).bfloat16()
    x = torch.randn(6, 80).bfloat16()[:, 16:]
    x[1], x[2] = 0.0, x[2] * 64
    want = OPS["gemm.linear"].body(x, w, bias)
    torch.testing.assert_close(kernel(x, w, bias), want, **BF16)
    torch.testing.assert_close(kernel(x.view(2, 3, 64), w), OPS["gemm.linear"].body(x.view(2, 3, 64), w), **BF16)
    assert kernel(x[:0], w, bias).shape == (0, 48)


def by_definition(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    recipe_a: ScalingType,
    scale_b: Tensor,
    recipe_b: ScalingType,
    *,
    output_dtype: torch.dtype,
) -> Tensor:
    """Products by blocks of 128, which PyTorch has no body of on a host."""
    assert (recipe_a, recipe_b) == (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
    wide_a = a.float() * scale_a.repeat_interleave(128, dim=1)
    wide_b = b.float() * scale_b.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return (wide_a @ wide_b).to(output_dtype)


@pytest.mark.parametrize("biased", [False, True])
def test_blocks(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "scaled_mm", by_definition)
    w, bias = weight("fp8.block128", 256, 512), torch.randn(256).bfloat16() if biased else None
    x = torch.randn(5, 512).bfloat16()
    torch.testing.assert_close(
        linear.block_scaled(x, w, bias), OPS["gemm.linear"].body(x, w, bias), rtol=2**-7, atol=0.1
    )
    assert linear.block_scaled(x[:0], w, bias).shape == (0, 256)


@pytest.mark.parametrize(("fmt", "kind"), [("fp8.tensor", "fp8"), ("fp8.block128", "fp8_block")])
def test_codes_give_the_bits_that_their_numbers_give(fmt: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "fp8_block":
        monkeypatch.setattr(linear, "scaled_mm", by_definition)
    kernel = linear.block_scaled if kind == "fp8_block" else linear.row_scaled
    w, x = weight(fmt, 128, 512), torch.randn(2, 3, 512).bfloat16()
    code, scale = quantise(x.flatten(0, 1), kind)
    given = Codes(code.view(torch.float8_e4m3fn).view(x.shape), scale.view(2, 3, -1), x.dtype)
    assert torch.equal(kernel(given, w), kernel(x, w))


def test_what_a_gpu_takes() -> None:
    """PyTorch's checks for a GPU: strides, sizes, and the layout of scales. Sizes that `supports` refuses, it refuses."""
    bias = torch.empty(256, dtype=torch.bfloat16, device="meta")
    for rows in (1, 70):
        y = linear.by_rows(codes(rows, 1024), scales(rows, 1), codes(256, 1024), scales(256), bias)
        assert (y.shape, y.dtype) == ((rows, 256), torch.bfloat16)
        assert (
            linear.by_blocks(codes(rows, 1024), scales(rows, 8), codes(256, 1024), scales(2, 8), None).shape == y.shape
        )
    with pytest.raises(RuntimeError, match="divisible by 16"):
        linear.by_rows(codes(70, 1032), scales(70, 1), codes(256, 1032), scales(256), None)
    with pytest.raises(RuntimeError, match="1x128 x 128x128"):
        linear.by_blocks(codes(70, 640), scales(70, 5), codes(256, 640), scales(2, 5), None)


def test_dense() -> None:
    x, w = torch.randn(3, 8), OPS["quant.quantize"].body(torch.randn(4, 8), "dense")
    assert torch.equal(linear.dense(x, w), OPS["gemm.linear"].body(x, w))
