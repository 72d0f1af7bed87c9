"""Routing, grouped products and fused experts against loops over tokens and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.ops import gemm
from sglang_core.ops.gemm import dense, grouped
from sglang_core.ops.moe import ExpertSpec, RouteSpec, fused, route
from sglang_core.ops.weight import PackedWeight

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
X, M, F_ = 6, 10, 7  # experts, hidden size, width


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 0)
    return {"atol": 16 * eps, "rtol": 2 * eps}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# moe.route

LOGITS = torch.tensor([[0.1, 2.0, -1.0, 1.5, 0.3, 1.9], [3.0, 0.0, 2.5, -2.0, 2.9, 0.2]])


def naive_route(row: Tensor, spec: RouteSpec, bias: Tensor) -> tuple[list[float], list[int]]:
    scores = {"softmax": row.softmax(-1), "sigmoid": row.sigmoid(), "softmax_after_top_k": row}[spec.scoring]
    choice = (scores + bias).tolist()
    size = spec.num_experts // spec.num_groups
    groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(spec.num_groups)]
    value = [g[0] if spec.group_score == "max" else g[0] + g[1] for g in groups]
    kept = sorted(range(spec.num_groups), key=lambda g: -value[g])[: spec.top_groups]
    ids = sorted((e for e in range(spec.num_experts) if e // size in kept), key=lambda e: -choice[e])[: spec.top_k]
    weights = scores[ids].softmax(-1) if spec.scoring == "softmax_after_top_k" else scores[ids]
    weights = weights / weights.sum() if spec.renormalize else weights
    return (weights * spec.scale).tolist(), ids


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_after_top_k"])
@pytest.mark.parametrize("groups", [{}, {"num_groups": 3, "top_groups": 2}])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("more", [{}, {"renormalize": True, "scale": 2.5}])
def test_route(scoring: Any, groups: Any, group_score: Any, biased: bool, more: Any) -> None:
    spec = RouteSpec(
        num_experts=12, top_k=3, scoring=scoring, group_score=group_score, has_bias=biased, **groups, **more
    )
    logits = torch.randn(40, 12, dtype=torch.float64)
    bias = torch.randn(12, dtype=torch.float64) * biased
    weights, ids = route(logits, spec, bias if biased else None)
    for t in range(40):
        expected, chosen = naive_route(logits[t], spec, bias)
        assert ids[t].tolist() == chosen
        assert weights[t].tolist() == pytest.approx(expected)


def test_route_of_halves_is_float32_and_equals_rank_by_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]], dtype=torch.bfloat16)
    weights, ids = route(logits, RouteSpec(num_experts=5, top_k=2))
    assert (weights.dtype, ids.dtype, ids.tolist()) == (torch.float32, torch.int32, [[1, 2]])
    assert torch.equal(weights, logits.float().softmax(-1)[:, 1:3])
    grouped_ids = route(torch.ones(1, 6), RouteSpec(num_experts=6, top_k=2, num_groups=3, top_groups=2))[1]
    assert grouped_ids.tolist() == [[0, 1]]


def test_a_bias_moves_the_choice_and_not_the_weights() -> None:
    spec = RouteSpec(num_experts=6, top_k=1, scoring="sigmoid", has_bias=True)
    weights, ids = route(LOGITS, spec, torch.tensor([0.0, 0, 9, 0, 0, 0]))
    assert ids.tolist() == [[2], [2]]
    assert torch.equal(weights, LOGITS[:, 2:3].sigmoid())
    with pytest.raises(AssertionError, match="has_bias"):
        route(LOGITS, spec)


def test_a_negative_choice_inside_the_best_groups_beats_zero_outside() -> None:
    """With a bias, selection scores may be below the zero that some implementations mask with."""
    spec = RouteSpec(num_experts=4, top_k=2, scoring="sigmoid", num_groups=2, top_groups=1, has_bias=True)
    _, ids = route(torch.zeros(1, 4), spec, torch.tensor([5.0, -9.0, 0.0, 0.0]))
    assert ids.tolist() == [[0, 1]]


def test_specs_that_cannot_be() -> None:
    for bad in ({"num_groups": 4}, {"num_groups": 3, "top_groups": 4}, {"num_groups": 3, "top_k": 3}, {"top_k": 7}):
        with pytest.raises(AssertionError):
            RouteSpec(**{"num_experts": 6, "top_k": 2, **bad})


# gemm.grouped


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 0, 0), (1, 0, 2), (0, 70, 5), (300, 1, 0), (0, 0, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_grouped(dtype: torch.dtype, sizes: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "COPY_ELEMENTS", 200)  # two experts at a time
    past = 3
    x, w = torch.randn(sum(sizes) + past, 9).to(dtype), torch.randn(3, 11, 9).to(dtype)
    bias = torch.randn(3, 11).to(dtype) if biased else None
    y = grouped(x, dense(w), ints(*sizes), bias)
    expected, start = torch.zeros(sum(sizes) + past, 11, dtype=torch.float64), 0
    for e, n in enumerate(sizes):
        row = slice(start, start + n)
        expected[row] = x[row].double() @ w[e].double().T + (bias[e].double() if bias is not None else 0)
        start += n
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **tolerance(dtype))


def test_grouped_without_rows() -> None:
    assert grouped(torch.ones(0, 9), dense(torch.ones(3, 11, 9)), ints(0, 0, 0)).shape == (0, 11)


def test_work_grows_with_the_rows_and_not_with_the_experts() -> None:
    assert gemm._tiling(8, 16) == gemm._tiling(8, 128) == (1, 8)
    for rows in (1, 7, 64, 1000, 20_000):
        for experts in (1, 8, 256):
            height, tiles = gemm._tiling(rows, experts)
            assert tiles <= min(rows, experts) + rows // height
            assert height * tiles <= 4 * rows + 256 * min(
                rows, experts
            )  # multiplied; a loop over experts takes rows * experts


# moe.fused


def naive_expert(x: Tensor, w13: Tensor, w2: Tensor, b13: Any, b2: Any, act: ExpertSpec) -> Tensor:
    gate, up = (x @ w13.T + b13).chunk(2)
    if act.activation == "swiglu_clamped":
        gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        h = gate * torch.sigmoid(act.alpha * gate) * (up + 1)
    elif act.activation == "silu":
        h = F.silu(gate) * up
    else:
        h = F.gelu(gate, approximate="tanh" if act.activation == "gelu_tanh" else "none") * up
    return h @ w2.T + b2


def naive_fused(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, act: ExpertSpec, **more: Any
) -> Tensor:
    b13, b2, expert_map = more.get("bias13"), more.get("bias2"), more.get("expert_map")
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
            local = e if expert_map is None else int(expert_map[e])
            if local < 0:
                continue
            biases = [0 if b is None else b[local] for b in (b13, b2)]
            row = x[t] * weight if act.weight_on_input else x[t]
            y = naive_expert(row, w13[local], w2[local], *biases, act)
            out[t] += y if act.weight_on_input else y * weight
    return out


def inputs(tokens: int, k: int, dtype: torch.dtype, local: int = X) -> tuple[Tensor, ...]:
    x, w13, w2 = (torch.randn(*s).to(dtype) for s in ((tokens, M), (local, 2 * F_, M), (local, M, F_)))
    ids = torch.stack([torch.randperm(X)[:k] for _ in range(tokens)]).int() if tokens else torch.zeros(0, k).int()
    return x, w13, w2, torch.rand(tokens, k), ids


ACTS = [
    ExpertSpec(),
    ExpertSpec(activation="gelu"),
    ExpertSpec(activation="gelu_tanh"),
    ExpertSpec(activation="swiglu_clamped", alpha=1.3, limit=2.0),
    ExpertSpec(weight_on_input=True),
]


@pytest.mark.parametrize("act", ACTS, ids=lambda a: a.activation + "-in" * a.weight_on_input)
@pytest.mark.parametrize(("tokens", "k"), [(0, 2), (1, 1), (1, 3), (5, 2), (200, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_fused(act: ExpertSpec, tokens: int, k: int, biased: bool) -> None:
    x, w13, w2, weights, ids = inputs(tokens, k, torch.float64)
    biases = {"bias13": torch.randn(X, 2 * F_).double(), "bias2": torch.randn(X, M).double()} if biased else {}
    y = fused(x, dense(w13), dense(w2), weights, ids, act, **biases)
    torch.testing.assert_close(y, naive_fused(x, w13, w2, weights, ids, act, **biases))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_rounds_where_it_says(dtype: torch.dtype) -> None:
    x, w13, w2, weights, ids = inputs(9, 2, dtype)
    y = fused(x, dense(w13), dense(w2), weights, ids, ExpertSpec())
    expected = naive_fused(*(t.double() for t in (x, w13, w2, weights)), ids, ExpertSpec())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=20 * tolerance(dtype)["atol"], rtol=0)


def test_ranks_of_an_expert_parallel_group_sum_to_the_whole() -> None:
    x, w13, w2, weights, ids = inputs(20, 3, torch.float64)
    maps = [ints(0, -1, 1, -1, -1, -1), ints(-1, 0, -1, 2, -1, 1), ints(-1, -1, -1, -1, 0, -1)]
    total = torch.zeros_like(x)
    for expert_map in maps:
        held = [int((expert_map == i).nonzero()) for i in range(int(expert_map.max()) + 1)]
        part = fused(x, dense(w13[held]), dense(w2[held]), weights, ids, ExpertSpec(), expert_map=expert_map)
        torch.testing.assert_close(
            part, naive_fused(x, w13[held], w2[held], weights, ids, ExpertSpec(), expert_map=expert_map)
        )
        total += part
    torch.testing.assert_close(total, naive_fused(x, w13, w2, weights, ids, ExpertSpec()))


def test_a_token_of_padding_touches_no_other() -> None:
    x, w13, w2, weights, ids = inputs(6, 2, torch.float64)
    clean = fused(x, dense(w13), dense(w2), weights, ids, ExpertSpec())
    x[4], weights[4] = torch.nan, torch.nan
    dirty = fused(x, dense(w13), dense(w2), weights, ids, ExpertSpec())
    keep = [0, 1, 2, 3, 5]
    torch.testing.assert_close(dirty[keep], clean[keep])


def test_a_stack_gives_copies_of_its_experts() -> None:
    w = dense(torch.randn(4, 3, 2))
    assert (w.num_experts, w.out_features, w.in_features) == (4, 3, 2)
    chosen = w.experts(ints(2, 2, 0))
    assert (chosen.num_experts, chosen.fmt) == (3, "dense")
    assert torch.equal(chosen["weight"], w["weight"][[2, 2, 0]])
    with pytest.raises(AssertionError):
        dense(torch.ones(3, 2)).experts(ints(0))
    with pytest.raises(AssertionError):
        PackedWeight("dense", {}, out_features=1, in_features=1, num_experts=1, layout="odd").experts(ints(0))
