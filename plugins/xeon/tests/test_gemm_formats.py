"""gemm.linear on quantised weights, at every ISA level, against the op's body in float64."""

from __future__ import annotations

import pytest
import torch
from sglang_xeon import gemm
from tolerance import assert_close

from sglang_core.api.ops import OPS, Fmt, PackedWeight

LINEAR, QUANTIZE = OPS["gemm.linear"].body, OPS["quant.quantize"].body
FORMATS = [
    *("fp8.tensor", "fp8.tensor.static", "fp8.token_channel", "fp8.block128"),
    *("int8.token_channel", "int8.token_channel.asym"),
    *("int4.awq.g128", "int4.awq.g32", "int4.gptq.g64", "int4.gptq.g-1", "int4.gptq.g32.act_order"),
    *("int4.pack.g128", "int4.pack.g-1", "w4a8_fp8.g128", "mxfp4.g32"),
    *("nvfp4.g16", "nvfp4.g16.static", "nvfp4.g16.a16"),
]
# Rows for every tile that widens codes, and for those that read widened ones; columns that fill no panel; k that fills no group
# and no unit.
SHAPES = [(1, 200, 544), (2, 48, 256), (4, 17, 48), (7, 144, 400), (13, 33, 256), (400, 40, 272)]


def quantized(fmt: str, n: int, k: int) -> PackedWeight:
    static = Fmt.parse(fmt).static
    w = QUANTIZE(torch.randn(n, k), fmt, x_scale=torch.tensor([0.02]) if static else None)
    if Fmt.parse(fmt).act_order:
        w["group"].copy_(w["group"][torch.randperm(k)])
    return w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_is_the_body(level: str, fmt: str, dtype: torch.dtype) -> None:
    for m, n, k in SHAPES:
        w, x = quantized(fmt, n, k), torch.randn(m, k).to(dtype)
        bias = torch.randn(n).to(dtype) if m % 2 else None
        want = LINEAR(x.double(), w, None if bias is None else bias.double()).to(dtype)
        assert_close(gemm.linear(x, gemm.pack(w), bias), want, scale=k**0.5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_row_count_gives_the_same_rows(level: str, fmt: str) -> None:
    x, w = torch.randn(100, 544).bfloat16(), gemm.pack(quantized(fmt, 150, 544))
    whole = gemm.linear(x, w)
    for m in (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 97):
        assert torch.equal(gemm.linear(x[:m], w), whole[:m]), f"{m} rows differ from {len(x)}"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("n, k", [(33, 272), (16, 48), (130, 256)])
def test_unpack_inverts_pack(level: str, fmt: str, n: int, k: int) -> None:
    w = quantized(fmt, n, k)
    packed = gemm.pack(w)
    assert packed.layout == gemm.LAYOUT
    found = dict(gemm.unpack(packed).named_buffers())
    assert found.keys() == dict(w.named_buffers()).keys()
    for name, tensor in w.named_buffers():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("fmt", ["int4.awq.g32", "int8.token_channel", "fp8.block128", "mxfp4.g32"])
def test_a_stack_is_its_experts(fmt: str) -> None:
    stack = QUANTIZE(torch.randn(3, 40, 256), fmt)
    packed = gemm.pack(stack)
    for i in range(3):
        one = gemm.pack(stack.expert(i))
        assert all(torch.equal(tensor[i], one[name]) for name, tensor in packed.named_buffers())
    assert all(torch.equal(t, stack[name]) for name, t in gemm.unpack(packed).named_buffers())


def test_every_fp8_code_is_exact(level: str) -> None:
    """Subnormals too, which bf16 dot products would flush if they came as such."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0  # NaN
    value = codes.view(torch.float8_e4m3fn)
    w = PackedWeight(
        "fp8.token_channel",
        {"weight": value.repeat(16, 1), "scale": torch.ones(16)},
        out_features=16,
        in_features=256,
    )
    got = gemm.linear(torch.eye(256) * 448, gemm.pack(w))  # quantised: 448, with a scale of 1
    assert torch.equal(got[:, 3], value.float() * 448)


def test_int8_takes_the_lowest_code(level: str) -> None:
    """-128 times -128, whose pairs would saturate 16 bits."""
    w = PackedWeight(
        "int8.token_channel.asym",
        {"weight": torch.full((16, 64), -128, dtype=torch.int8), "scale": torch.ones(16)},
        out_features=16,
        in_features=64,
    )
    x = torch.full((2, 64), -255.0)
    assert torch.equal(gemm.linear(x, gemm.pack(w)), LINEAR(x, w))


@pytest.mark.parametrize("fmt", ["int8.token_channel", "fp8.token_channel", "int4.pack.g32", "nvfp4.g16"])
def test_a_nan_stays_in_its_row(level: str, fmt: str) -> None:
    for m in (3, 20):
        x, w = torch.randn(m, 64).bfloat16(), gemm.pack(quantized(fmt, 32, 64))
        x[1, 5] = float("nan")
        rows = gemm.linear(x, w).isnan()
        assert rows[1].all()
        assert rows.sum() == 32


def with_scales_of(dtype: torch.dtype, fmt: str, n: int = 40, k: int = 272) -> PackedWeight:
    """A checkpoint's: its scales are float32 numbers, of which these have no more bits than the dtype."""
    w = quantized(fmt, n, k)
    w["scale"].copy_((torch.rand(w["scale"].shape) + 0.5).to(dtype))
    return w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", ["int4.awq.g128", "int4.gptq.g32.act_order", "int4.pack.g32", "fp8.block128"])
def test_scales_are_kept_in_as_few_bits_as_they_have(level: str, fmt: str, dtype: torch.dtype) -> None:
    w = with_scales_of(dtype, fmt)
    packed = gemm.pack(w)
    assert packed["scales"].dtype == dtype
    assert torch.equal(gemm.unpack(packed)["scale"], w["scale"])
    for m in (1, 7, 13, 100):
        x = torch.randn(m, 272)
        assert_close(gemm.linear(x, packed), LINEAR(x.double(), w).float(), scale=272**0.5)


def test_scales_that_need_more_bits_are_written_over_shorter_ones() -> None:
    short, exact = (with_scales_of(dtype, "int4.awq.g128") for dtype in (torch.bfloat16, torch.float32))
    packed, x = gemm.pack(short), torch.randn(3, 272).bfloat16()
    gemm.linear(x, packed)
    gemm.pack(exact, packed)
    assert torch.equal(gemm.linear(x, packed), gemm.linear(x, gemm.pack(exact)))
    gemm.pack(short, packed)
    assert torch.equal(gemm.unpack(packed)["scale"], short["scale"])


def test_a_stack_has_scales_of_one_dtype() -> None:
    """As many bits as any of its experts needs."""
    stack = QUANTIZE(torch.randn(3, 40, 256), "int4.awq.g128")
    stack["scale"].copy_((torch.rand(stack["scale"].shape) + 0.5).bfloat16())
    stack["scale"][2].fill_(1 / 3)
    packed = gemm.pack(stack)
    assert packed["scales"].dtype == torch.float32
    assert torch.equal(gemm.unpack(packed)["scale"], stack["scale"])


def test_another_order_of_columns_that_does_not_fit_is_refused() -> None:
    w = quantized("int4.gptq.g32.act_order", 16, 64)
    packed = gemm.pack(w)
    w["group"].fill_(0)
    w["group"][:3] = 1
    with pytest.raises(ValueError, match="another g_idx"):
        gemm.pack(w, packed)
