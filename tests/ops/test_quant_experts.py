"""Grouped products and fused experts on stacks of every format, against loops in float64 over what codes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sglang_core.backend.strict_trace import trace_step
from sglang_core.ops import gemm, quant
from sglang_core.ops.formats import Fmt
from sglang_core.ops.gemm import grouped
from sglang_core.ops.moe import ExpertSpec, fused
from sglang_core.ops.weight import PackedWeight
from tests.ops.test_moe import ints
from tests.ops.test_quant import FORMATS

X, M, F = 4, 160, 96
PACKED = [f for f in FORMATS if f != "dense"]


def stack(fmt: str, num: int, rows: int, columns: int) -> PackedWeight:
    """Experts of different sizes, and with different input scales where the format has them."""
    scales = torch.linspace(0.01, 0.03, num)[:, None] if Fmt.parse(fmt).static else None
    return quant.quantize(
        torch.randn(num, rows, columns) * torch.arange(1, num + 1)[:, None, None], fmt, x_scale=scales
    )


def product(x: Tensor, w: PackedWeight, expert: int, bias: Tensor | None) -> Tensor:
    """x: float64[n, in] -> float64[n, out]: quantised as the format says, times what the codes of one expert stand for."""
    fmt = Fmt.parse(w.fmt)
    seen = quant.quantized_activations(x, fmt, w["x_scale"][expert] if fmt.static else None)
    y = seen @ quant.dequantize(w, torch.float64)[expert].T
    return y if bias is None else y + bias[expert].double()


@pytest.mark.parametrize("fmt", PACKED)
@pytest.mark.parametrize("sizes", [(0, 3, 1, 40), (1, 0, 0, 0)])
def test_grouped(fmt: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "COPY_ELEMENTS", F * M * 2)  # two experts at a time
    x, w, bias = torch.randn(sum(sizes) + 2, M), stack(fmt, X, F, M), torch.randn(X, F)
    expected = torch.zeros(sum(sizes) + 2, F, dtype=torch.float64)
    start = 0
    for e, n in enumerate(sizes):
        expected[start : start + n] = product(x[start : start + n].double(), w, e, bias)
        start += n
    exact = grouped(x.double(), w, ints(*sizes), bias.double())
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-10)
    close = grouped(x, w, ints(*sizes), bias)
    assert close.dtype == torch.float32
    assert float((close - expected).abs().max() / expected.abs().max()) < 2e-6


@pytest.mark.parametrize("fmt", PACKED)
@pytest.mark.parametrize(
    "act",
    [ExpertSpec(activation="swiglu_clamped", limit=2.0), ExpertSpec(weight_on_input=True)],
    ids=["clamp", "input"],
)
@pytest.mark.parametrize("biased", [False, True])
def test_fused_with_remote_experts(fmt: str, act: ExpertSpec, biased: bool) -> None:
    x, w13, w2 = torch.randn(7, M).double(), stack(fmt, X, 2 * F, M), stack(fmt, X, M, F)
    bias13, bias2 = (torch.randn(X, 2 * F).double(), torch.randn(X, M).double()) if biased else (None, None)
    expert_map = ints(2, -1, 0, 3, -1, 1)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(7)]).int()
    weights = torch.rand(7, 3).double()
    expected = torch.zeros_like(x)
    for t in range(7):
        for weight, e in zip(weights[t], expert_map[ids[t]].tolist(), strict=True):
            if e < 0:
                continue
            row = (x[t] * weight if act.weight_on_input else x[t])[None]
            gate, up = product(row, w13, e, bias13).chunk(2, dim=-1)
            if act.activation == "swiglu_clamped":
                gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
                h = gate * torch.sigmoid(act.alpha * gate) * (up + 1)
            else:
                h = torch.nn.functional.silu(gate) * up
            y = product(h, w2, e, bias2)[0]
            expected[t] += y if act.weight_on_input else y * weight
    y = fused(x, w13, w2, weights, ids, act, bias13=bias13, bias2=bias2, expert_map=expert_map)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("fmt", PACKED)
def test_the_bodies_trace_on_a_fake_device(fmt: str) -> None:
    w13, w2 = stack(fmt, X, 2 * F, M), stack(fmt, X, M, F)
    step = (torch.randn(3, M), torch.ones(3, 1), ints(0, 1, 2)[:, None])
    assert not trace_step(lambda _, fb: fused(fb[0], w13, w2, fb[1], fb[2], ExpertSpec()), None, step, []).kept


def test_an_expert_is_seldom_dequantised_twice() -> None:
    rows, experts = 64, 8  # eight rows an expert
    packed = gemm._tiling(rows, experts, gemm.DEQUANTIZE_ROWS)[1]
    assert packed <= 2 * experts < gemm._tiling(rows, experts, 1)[1]
