"""`lora.apply` and its siblings against plain sums in float64, one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sglang_core.ops.gemm import dense
from sglang_core.ops.lora import ExpertAdapters, lora_apply, lora_embed, lora_experts
from sglang_core.ops.moe import ExpertSpec, fused

A, R, IN, OUT = 4, 3, 10, 8
RANKS = (3, 1, 2, 0)  # of each adapter; the rest is zeros
BOUND = 1e-6  # relative to the largest: float32 sums of a few dozen terms


def stack(*shape: int, rank_dim: int, generator: torch.Generator) -> Tensor:
    """A stack of adapters with as many non-zero rows (or columns) as each has ranks."""
    x = torch.randn(*shape, generator=generator)
    for adapter, rank in enumerate(RANKS):
        x[adapter].narrow(rank_dim, rank, shape[rank_dim + 1] - rank).zero_()
    return x


def slow(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, token_adapter: Tensor, scale: Tensor, parts: tuple[int, ...]
) -> Tensor:
    out = y.double().clone()
    rank = b.shape[-1]
    for t, adapter in enumerate(token_adapter.tolist()):
        row = 0
        for p, size in enumerate(parts):
            if adapter >= 0:
                h = a[adapter, p * rank : (p + 1) * rank].double() @ x[t].double()
                out[t, row : row + size] += scale[adapter, p].double() * (b[adapter, row : row + size].double() @ h)
            row += size
    return out


def far(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-9)) if want.numel() else 0.0


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 5, 30])  # few tokens fetch, many are masked
@pytest.mark.parametrize("parts", [(OUT,), (4, 1, 3)])
def test_apply_is_the_sum_of_products(num_tokens: int, parts: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(num_tokens)
    p = len(parts)
    a = torch.cat([stack(A, R, IN, rank_dim=0, generator=g) for _ in range(p)], dim=1)
    b = stack(A, OUT, R, rank_dim=1, generator=g)
    y, x = torch.randn(num_tokens, OUT, generator=g), torch.randn(num_tokens, IN, generator=g)
    own = torch.randint(-1, A, (num_tokens,), generator=g, dtype=torch.int32)
    scale = torch.rand(A, p, generator=g) * 3
    got = lora_apply(y, x, a, b, own, scale, parts if p > 1 else ())
    want = slow(y, x, a, b, own, scale, parts)
    assert far(got, want) < BOUND
    assert torch.equal(got[own < 0], y[own < 0])
    for name, changed in {"scale": torch.ones_like(scale), "own": (own + 1) % A}.items():  # each of them matters
        other = slow(y, x, a, b, own if name == "scale" else changed, changed if name == "scale" else scale, parts)
        if num_tokens > 3:
            assert far(other, want) > 10 * BOUND, name


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_neighbours_change_no_bit(num_tokens: int) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = stack(A, R, IN, rank_dim=0, generator=g), stack(A, OUT, R, rank_dim=1, generator=g)
    y, x, scale = torch.randn(num_tokens, OUT, generator=g), torch.randn(num_tokens, IN, generator=g), torch.rand(A, 1)
    mine = torch.full((num_tokens,), -1, dtype=torch.int32)
    mine[1] = 2
    crowded = torch.randint(-1, A, (num_tokens,), generator=g, dtype=torch.int32)
    crowded[1] = 2
    before = lora_apply(y, x, a, b, mine, scale)
    assert torch.equal(before[1], lora_apply(y, x, a, b, crowded, scale)[1])
    others = torch.arange(A) != 2  # what the other slots hold is nobody's business
    assert torch.equal(
        before[1], lora_apply(y, x, a + others[:, None, None], b + others[:, None, None], mine, scale)[1]
    )
    assert torch.equal(before[mine < 0], y[mine < 0])


def test_one_rounding_to_a_half_type() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*s, generator=g).bfloat16() for s in ((A, R, IN), (A, OUT, R)))
    y, x = torch.randn(9, OUT, generator=g).bfloat16(), torch.randn(9, IN, generator=g).bfloat16()
    own, scale = torch.arange(9, dtype=torch.int32) % A, torch.rand(A, 1, generator=g)
    want = slow(y, x, a, b, own, scale, (OUT,))
    got = lora_apply(y, x, a, b, own, scale)
    assert got.dtype == torch.bfloat16
    assert float((got.double() - want.bfloat16().double()).abs().max() / want.abs().max()) < 2**-8  # a tie at most
    assert float(((got.double() - want).abs() / want.abs()).max()) < 2**-8 * 1.01  # half an ulp of each element


@pytest.mark.parametrize("num_tokens", [2, 17])
@pytest.mark.parametrize("start", [0, 5])
def test_embed_looks_a_up(num_tokens: int, start: int) -> None:
    g = torch.Generator().manual_seed(2)
    table, b = torch.randn(A, 12, R, generator=g), torch.randn(A, OUT, R, generator=g)
    y, ids = torch.randn(num_tokens, OUT, generator=g), torch.randint(0, 24, (num_tokens,), generator=g).int()
    own = torch.randint(-1, A, (num_tokens,), generator=g, dtype=torch.int32)
    scale = torch.rand(A, 1, generator=g)
    want = y.double().clone()
    for t, adapter in enumerate(own.tolist()):
        local = int(ids[t]) - start
        if adapter >= 0 and 0 <= local < 12:
            want[t] += float(scale[adapter, 0]) * (b[adapter].double() @ table[adapter, local].double())
    got = lora_embed(y, ids, table, b, own, scale, start)
    assert far(got, want) < BOUND
    assert torch.equal(got[own < 0], y[own < 0])
    assert num_tokens == 2 or far(y.double(), want) > 10 * BOUND


@pytest.mark.parametrize(
    "act", [ExpertSpec(), ExpertSpec(activation="swiglu_clamped"), ExpertSpec(weight_on_input=True)]
)
@pytest.mark.parametrize("remote", [False, True])
def test_experts_are_those_with_merged_weights(act: ExpertSpec, remote: bool) -> None:
    g = torch.Generator().manual_seed(3)
    num, k, hidden, width, tokens = 5, 2, 8, 6, 11
    w13, w2 = torch.randn(num, 2 * width, hidden, generator=g), torch.randn(num, hidden, width, generator=g)
    adapters = ExpertAdapters(
        a13=torch.randn(A, num, 2 * R, hidden, generator=g) * 0.3,
        b13=torch.randn(A, num, 2 * width, R, generator=g) * 0.3,
        a2=torch.randn(A, num, R, width, generator=g) * 0.3,
        b2=torch.randn(A, num, hidden, R, generator=g) * 0.3,
        scale=torch.rand(A, num, 3, generator=g) + 0.5,
    )
    bias13, bias2 = torch.randn(num, 2 * width, generator=g), torch.randn(num, hidden, generator=g)
    x = torch.randn(tokens, hidden, generator=g)
    ids = torch.stack([torch.randperm(num, generator=g)[:k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, k, generator=g)
    own = torch.randint(-1, A, (tokens,), generator=g, dtype=torch.int32)
    more = {"bias13": bias13, "bias2": bias2}
    if remote:
        more["expert_map"] = torch.tensor([0, -1, 2, 3, -1], dtype=torch.int32)
    got = lora_experts(x, dense(w13), dense(w2), weights, ids, act, adapters, own, **more)
    base = fused(x, dense(w13), dense(w2), weights, ids, act, **more)
    s = adapters.scale
    for t in range(tokens):
        m13, m2 = w13.double(), w2.double()
        if (at := int(own[t])) >= 0:
            delta = [
                s[at, :, i, None, None].double()
                * adapters.b13[at].double()[:, i * width : (i + 1) * width]
                @ adapters.a13[at].double()[:, i * R : (i + 1) * R]
                for i in (0, 1)
            ]
            m13 = m13 + torch.cat(delta, dim=1)
            m2 = m2 + s[at, :, 2, None, None].double() * (adapters.b2[at].double() @ adapters.a2[at].double())
        row = slice(t, t + 1)
        doubles = {name: value.double() if value.is_floating_point() else value for name, value in more.items()}
        want = fused(x[row].double(), dense(m13), dense(m2), weights[row].double(), ids[row], act, **doubles)
        assert far(got[row], want) < 1e-5
        if at < 0:
            assert float((got[row] - base[row]).abs().max()) < 1e-5
    assert float((got - base)[own >= 0].abs().max()) > 1e-2
    untouched = lora_experts(x, dense(w13), dense(w2), weights, ids, act, adapters, None, **more)
    assert torch.allclose(untouched, base, atol=1e-5)
