"""fp8 on CDNA 3: every code there is, and the numbers that come of them. PyTorch's host has the type, and no product of it: one stands in."""

from __future__ import annotations

import pytest
import torch
from sglang_rocm import fnuz
from sglang_rocm.backend import RocmBackend
from sglang_triton.gpu import linear
from torch import Tensor

from sglang_core.api import DeviceInfo, OpSite, WeightError
from sglang_core.api.ops import OPS, PackedWeight
from sglang_core.backend.selection import BoundOp, OpTable

CODES = torch.arange(256, dtype=torch.uint8)
NUMBERS = CODES[CODES & 0x7F != 0x7F]  # of e4m3fn


def product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    _a: object,
    scale_b: Tensor,
    _b: object,
    *,
    bias: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:
    """What the matrix cores do: products of what the bytes are to them, float32 sums, then both scales."""
    assert a.dtype == b.dtype == torch.float8_e4m3fnuz
    y = (a.float() @ b.float()) * scale_a * scale_b
    return (y if bias is None else y + bias).to(output_dtype)


@pytest.fixture(autouse=True)
def matrix_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "scaled_mm", product)


def weight(code: Tensor, scale: Tensor, fmt: str = "fp8.token_channel", x_scale: float | None = None) -> PackedWeight:
    tensors = {"weight": code.view(torch.float8_e4m3fn), "scale": scale}
    if x_scale is not None:
        tensors["x_scale"] = torch.tensor([x_scale])
    return PackedWeight(fmt, tensors, out_features=code.shape[0], in_features=code.shape[1])


def test_each_code_stands_for_half_of_what_it_stood_for() -> None:
    half = fnuz.without_minus_zero(NUMBERS).view(torch.float8_e4m3fnuz).float()
    assert torch.equal(half * 2, NUMBERS.view(torch.float8_e4m3fn).float())
    assert half.abs().max() == 224
    unpacked = fnuz.unpack(fnuz.pack(weight(NUMBERS[None], torch.ones(1))))["weight"]
    assert unpacked.isnan().sum() == 0 and torch.equal(unpacked.float()[0], NUMBERS.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("static", [False, True])
def test_a_product_of_every_pair_of_codes(static: bool) -> None:
    """x: each number of e4m3fn a row alone, so that its own code is one of +-448 and 0; then all of them in a row."""
    numbers = NUMBERS.view(torch.float8_e4m3fn).float()
    columns = torch.nn.functional.pad(NUMBERS, (0, 2)).repeat(2, 1)
    w = weight(
        columns,
        torch.tensor([1.0, 2.0**-9]),
        "fp8.tensor.static" if static else "fp8.token_channel",
        1.0 if static else None,
    )
    x = torch.cat([torch.diag(numbers), numbers.repeat(3, 1)])
    x = torch.nn.functional.pad(x, (0, 2)).bfloat16()
    kernel = fnuz.static_scaled if static else fnuz.row_scaled
    want = OPS["gemm.linear"].body(x, w)
    assert torch.equal(kernel(x, fnuz.pack(w)), want) and want.isfinite().all()


@pytest.mark.parametrize("scale", [1e-38, 2.0**126, 3e38])
def test_scales_at_the_ends_of_float32(scale: float) -> None:
    """A scale of 3e38 doubled would be infinite; the numbers that it makes are not."""
    torch.manual_seed(0)
    w = weight(torch.tensor([[0x08, 0x88, 0x80, 0x38]] * 2, dtype=torch.uint8).repeat(1, 8), torch.tensor([scale, 1.0]))
    x = (torch.randn(3, 32) * (2.0**-100 if scale > 1 else 2.0**100)).bfloat16()
    want = OPS["gemm.linear"].body(x, w)
    assert want.isfinite().all() and bool((want[:, 0] != 0).all())
    torch.testing.assert_close(fnuz.row_scaled(x, fnuz.pack(w)), want, rtol=2**-7, atol=0)


def test_packing_again_writes_where_it_lies_and_a_nan_is_refused() -> None:
    first, second = (weight(NUMBERS.roll(i).repeat(2, 1), torch.rand(2)) for i in (0, 9))
    packed = fnuz.pack(first)
    place = packed["weight"].data_ptr()
    assert fnuz.pack(second, out=packed)["weight"].data_ptr() == place and packed.layout != "canonical"
    assert torch.equal(packed["weight"].float(), second["weight"].float()) and torch.equal(
        packed["scale"], second["scale"]
    )
    assert first["weight"].view(torch.uint8).eq(0x80).any()  # not written through
    with pytest.raises(WeightError, match="NaN"):
        fnuz.pack(weight(CODES.repeat(2, 1), torch.ones(2)))


def bound(target: str, fmt: str) -> BoundOp:
    info = DeviceInfo(backend="rocm", path=f"rocm/{target}", name="test")
    site = OpSite(op="gemm.linear", layer="Linear", dtype="bfloat16", fmt=fmt, dims={"in": 512, "out": 256})
    return OpTable(info, RocmBackend(), ops=OPS, page_size=16).bind(site)


def test_each_target_gets_the_codes_that_it_reads() -> None:
    old, new = bound("gfx942", "fp8.token_channel"), bound("gfx950", "fp8.token_channel")
    assert [kernel.fn for kernel in old.kernels] == ["sglang_triton.gemm:linear", "sglang_rocm.fnuz:row_scaled"]
    assert [kernel.fn for kernel in new.kernels] == ["sglang_triton.gemm:linear", "sglang_triton.gpu.linear:row_scaled"]
    assert old.pack is fnuz.pack and new.pack is None
    assert bound("gfx942", "fp8.tensor.static").pack is fnuz.pack
    assert {bound(target, "fp8.block128").provider for target in ("gfx942", "gfx950")} == {"triton"}


def test_both_variants_read_what_is_packed() -> None:
    torch.manual_seed(0)
    op, x = bound("gfx942", "fp8.token_channel"), torch.randn(80, 512).bfloat16()
    w = OPS["quant.quantize"].body(torch.randn(256, 512), "fp8.token_channel")
    packed = op.pack(w)
    for rows in (3, 80):
        torch.testing.assert_close(op.fn(x[:rows], packed), OPS["gemm.linear"].body(x[:rows], w), rtol=2**-7, atol=0.1)
