"""Formats, their canonical tensors, and the products with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sglang_core.backend.strict_trace import trace_step
from sglang_core.errors import ConfigError
from sglang_core.ops import quant
from sglang_core.ops.formats import INT4_GROUPS, Fmt
from sglang_core.ops.gemm import linear
from sglang_core.ops.weight import PackedWeight

X_SCALE = torch.tensor([0.01])
FORMATS = [
    *("dense", "fp8.tensor", "fp8.tensor.static", "fp8.token_channel", "fp8.block128"),
    *("int8.token_channel", "int8.token_channel.asym", "mxfp4.g32"),
    *("nvfp4.g16", "nvfp4.g16.static", "nvfp4.g16.a16"),
    *(f"{kind}.g{g}" for kind in ("int4.awq", "int4.gptq", "int4.pack", "w4a8_fp8") for g in INT4_GROUPS),
    *("int4.gptq.g32.act_order", "int4.gptq.g128.act_order"),
]
OUT, IN = 136, 288  # no multiple of 128
ERROR = {"fp8": 2**-4, "int8": 2**-7, "int4": 0.14, "e2m1": 0.27, "dense": 0.0}  # of the largest, of an element


def quantized(fmt: str, w: Tensor) -> PackedWeight:
    shape = (w.shape[0], 1) if w.ndim == 3 else (1,)
    return quant.quantize(w, fmt, x_scale=X_SCALE.expand(shape) if Fmt.parse(fmt).static else None)


@pytest.mark.parametrize("fmt", FORMATS)
def test_tensors_are_those_of_the_table(fmt: str) -> None:
    w = quantized(fmt, torch.randn(OUT, IN))
    wanted = Fmt.parse(fmt).containers(IN)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in w.named_buffers()} == {
        n: (c.dtype, c.shape(OUT, IN)) for n, c in wanted.items()
    }


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantising_what_was_dequantised_changes_nothing(fmt: str) -> None:
    w = torch.randn(OUT, IN) * torch.logspace(-2, 1, OUT)[:, None]
    once = quant.dequantize(quantized(fmt, w))
    assert torch.equal(quant.dequantize(quantized(fmt, once)), once)
    assert torch.equal(quant.dequantize(quantized(fmt, once), torch.float64), once.double())  # float32 was exact
    f = Fmt.parse(fmt)
    per_row = (w - once).abs().amax(1) / w.abs().amax(1)
    worst = per_row if f.element != "e2m1" and not f.one_scale else (w - once).abs().max() / w.abs().max()
    assert float(worst.max()) <= ERROR[f.element]


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_stack_is_its_matrices(fmt: str) -> None:
    w = torch.randn(3, OUT, IN)
    stack = quantized(fmt, w)
    assert stack.num_experts == 3
    one = torch.stack([quant.dequantize(quantized(fmt, m)) for m in w])
    assert torch.equal(quant.dequantize(stack), one)


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_stay_zeros(fmt: str) -> None:
    w = quantized(fmt, torch.zeros(4, IN))
    assert not quant.dequantize(w).any()
    assert not linear(torch.zeros(2, IN), w).any()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_the_product_of_what_the_codes_stand_for(fmt: str, dtype: torch.dtype) -> None:
    x, bias = torch.randn(2, 5, IN).to(dtype), torch.randn(OUT).to(dtype)
    w = quantized(fmt, torch.randn(OUT, IN).to(dtype) if fmt == "dense" else torch.randn(OUT, IN))
    f = Fmt.parse(fmt)
    seen = quant.quantized_activations(x.double(), f, X_SCALE)
    oracle = seen @ quant.dequantize(w, torch.float64).t() + bias.double()
    y = linear(x, w, bias)
    assert y.dtype == dtype
    eps = 2e-6 if dtype == torch.float32 else 2**-8
    assert float((y - oracle).abs().max() / oracle.abs().max()) < eps
    if fmt != "dense":
        assert torch.allclose(linear(x.double(), w, bias.double()), oracle, rtol=1e-13, atol=1e-12)
    changed = float((seen - x.double()).abs().max())
    assert (changed == 0) == (f.activation == "as_is")
    assert linear(x[:, :0], w, bias).shape == (2, 0, OUT)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f != "dense"])
def test_a_token_does_not_depend_on_its_neighbours(fmt: str) -> None:
    x, w = torch.randn(4, IN), quantized(fmt, torch.randn(OUT, IN))
    noisy = torch.cat([x, torch.full((1, IN), 1e4), torch.full((1, IN), float("nan"))])
    assert torch.allclose(linear(noisy, w)[:4], linear(x, w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_body_traces_on_a_fake_device(fmt: str) -> None:
    w = quantized(fmt, torch.randn(OUT, IN))
    assert not trace_step(lambda _, fb: linear(fb[0], w), None, (torch.randn(3, IN),), []).kept


def test_int8_sums_are_exact() -> None:
    x, ones = torch.full((1, 8192), 127.0), torch.ones(3)
    x[0, 0] = 126.0
    codes = torch.full((3, 8192), 127, dtype=torch.int8)
    w = PackedWeight("int8.token_channel", {"weight": codes, "scale": ones}, out_features=3, in_features=8192)
    assert linear(x.double(), w).tolist() == [[(8191 * 127 + 126) * 127] * 3]
    w.fmt = "int8.token_channel.asym"
    assert linear(x.double() + 128, w).tolist() == [[(8191 * 255 + 254) * 127] * 3]


def test_act_order_takes_each_columns_group() -> None:
    w = quant.quantize(torch.randn(4, 64), "int4.gptq.g32.act_order")
    order = torch.randperm(64)
    codes = quant.unpack4(w["weight"])[:, order]
    shuffled = {"weight": quant.pack4(codes), "scale": w["scale"], "zero": w["zero"], "group": w["group"][order]}
    moved = PackedWeight(w.fmt, shuffled, out_features=4, in_features=64)
    assert torch.equal(quant.dequantize(moved), quant.dequantize(w)[:, order])


def test_codes() -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal(quant.from_e2m1(torch.arange(16).to(torch.uint8)), torch.cat([values, -values]))
    assert torch.equal(quant.to_e2m1(values), torch.arange(8).to(torch.uint8))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 99.0])
    assert quant.from_e2m1(quant.to_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert quant.from_e2m1(quant.to_e2m1(-ties)).tolist() == [0, -1, -1, -2, -2, -4, -4, -6]
    powers = quant.from_e8m0(torch.tensor([0, 1, 127, 130, 254, 255], dtype=torch.uint8))
    assert powers[:5].tolist() == [2.0**-127, 2.0**-126, 1.0, 8.0, 2.0**127] and bool(powers[5].isnan())
    assert quant.to_e8m0(torch.tensor([0.0, 1.0, 6.0, 7.9, 8.0])).tolist() == [0, 125, 127, 127, 128]
    assert quant.to_fp8(torch.tensor([1e6, -1e6, 17.0, 19.0]), torch.ones(1)).float().tolist() == [448, -448, 16, 20]
    assert quant.to_int8(torch.tensor([0.5, 1.5, -2.5, 300.0, -300.0]), torch.ones(1)).tolist() == [0, 2, -2, 127, -127]
    codes = torch.randint(0, 16, (3, 10)).to(torch.uint8)
    assert torch.equal(quant.unpack4(quant.pack4(codes)), codes)
    assert quant.pack4(torch.tensor([[1, 2]])).tolist() == [[0x21]]


@pytest.mark.parametrize("name", ["int4", "int4.awq.g100", "int4.awq.g128.act_order", "fp8", "fp8.block64", "bf16", ""])
def test_unknown_formats_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not known; there are"):
        Fmt.parse(name)
