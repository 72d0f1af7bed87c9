"""Mixture of experts: which experts a token goes to, and what they make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sglang_core.ops.activation import GateKind, gated
from sglang_core.ops.gemm import grouped
from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide
from sglang_core.ops.weight import PackedWeight

Scoring = Literal["softmax", "sigmoid", "softmax_after_top_k"]
GroupScore = Literal["max", "top2_sum"]
ExpertGate = Literal[GateKind, "swiglu_clamped"]
TINY = 1e-20  # added to a sum of weights before dividing by it


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteSpec:
    """How router logits become experts and weights.

    `scoring` makes scores of logits; "softmax_after_top_k" selects by the logits themselves and takes the softmax over those
    selected. With groups, the experts are `num_groups` runs of equal length, and only the `top_groups` best may be chosen
    from. `has_bias`: a bias per expert counts when groups and experts are selected, and not in the weights.
    """

    num_experts: int
    top_k: int
    scoring: Scoring = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"  # of a group: its best score, or the sum of its best two
    has_bias: bool = False
    renormalize: bool = False  # weights sum to 1, before `scale`
    scale: float = 1.0

    def __post_init__(self) -> None:
        assert self.num_experts % self.num_groups == 0, f"{self.num_experts} experts in {self.num_groups} groups"
        assert 1 <= self.top_groups <= self.num_groups, f"the best {self.top_groups} of {self.num_groups} groups"
        size = self.num_experts // self.num_groups
        assert 1 <= self.top_k <= self.top_groups * size, f"{self.top_k} of {self.top_groups} groups of {size} experts"
        assert self.group_score == "max" or size > 1, "the best two of groups of one expert"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpec:
    """What an expert computes: w2 act(w13 x), w13 being gate rows and then up rows.

    "swiglu_clamped": gate at most `limit`, up within +-`limit`, then gate * sigmoid(alpha * gate) * (up + 1).
    """

    activation: ExpertGate = "silu"
    alpha: float = 1.702  # alpha and limit: of swiglu_clamped only
    limit: float = 7.0
    weight_on_input: bool = False  # a token is multiplied by its router weight before the expert, else after it


@op("moe.route")
def route(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits: [T, X], bias: float32[X] -> weights: float32[T, K], ids: int32[T, K], the best first; equals rank by id.

    Computed in float32. Experts outside the chosen groups are out of question, whatever their score.
    """
    assert (bias is not None) == spec.has_bias, (
        f"has_bias={spec.has_bias}, and a bias was {'' if bias is None else 'not '}missing"
    )
    scores = _scores(wide(logits), spec.scoring)
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    if spec.top_groups < spec.num_groups:
        choice = torch.where(_in_top_groups(choice, spec), choice, -torch.inf)
    ids = _best(choice, spec.top_k)
    weights = scores.gather(1, ids)
    if spec.scoring == "softmax_after_top_k":
        weights = weights.softmax(-1)
    if spec.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return weights * spec.scale, ids.int()


def _scores(logits: Tensor, scoring: Scoring) -> Tensor:
    if scoring == "softmax":
        return logits.softmax(-1)
    assert scoring in ("sigmoid", "softmax_after_top_k"), f"unknown scoring {scoring!r}"
    return logits.sigmoid() if scoring == "sigmoid" else logits


def _in_top_groups(choice: Tensor, spec: RouteSpec) -> Tensor:
    """choice: [T, X] -> bool[T, X]."""
    by_group = choice.view(-1, spec.num_groups, spec.num_experts // spec.num_groups)
    score = by_group.amax(-1) if spec.group_score == "max" else by_group.topk(2, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, _best(score, spec.top_groups), True)
    return chosen[..., None].expand(by_group.shape).flatten(1)


def _best(scores: Tensor, k: int) -> Tensor:
    """scores: [T, X] -> int64[T, k], the highest first; of equals the lower index, which `topk` leaves open."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


@op("moe.fused", weighted=True)
def fused(
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    weights: Tensor,
    ids: Tensor,
    act: ExpertSpec,
    *,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """x: [T, M], w13: [X, 2F, M], w2: [X, M, F], weights: float32[T, K], ids: int32[T, K] -> [T, M].

    bias13: [X, 2F], bias2: [X, M]. `expert_map`: int32 over the ids, the local expert (of the X here) or -1 for one held by
    another rank, which adds nothing. Each expert's product is rounded to x.dtype at w13, at the activation and at w2; the
    K results are weighted and summed in float32, and rounded once.
    """
    local = ids.flatten() if expert_map is None else expert_map[ids.flatten()]
    num_experts, k = _num_experts(w13), ids.shape[1]
    group = torch.where(local >= 0, local, num_experts).long()  # what is remote comes last, and in no group
    order = torch.sort(group, stable=True).indices
    sizes = torch.zeros(num_experts + 1, dtype=torch.int32, device=x.device)
    sizes = sizes.scatter_add(0, group, torch.ones_like(local, dtype=torch.int32))[:-1]
    rows = x[order // k]
    if act.weight_on_input:
        rows = (wide(rows) * weights.flatten()[order, None]).to(x.dtype)
    h = activate(grouped(rows, w13, sizes, bias13), act)
    y = torch.empty_like(rows).index_put((order,), grouped(h, w2, sizes, bias2))
    y = wide(y).view(x.shape[0], k, w2.out_features)
    return (y if act.weight_on_input else y * weights[..., None]).sum(1).to(x.dtype)


def _num_experts(w: PackedWeight) -> int:
    assert w.num_experts is not None, "moe.fused takes stacks of experts"
    return w.num_experts


def activate(x: Tensor, act: ExpertSpec) -> Tensor:
    """x: [S, 2F], gate then up -> [S, F]. float32 inside, one rounding to x.dtype at the end."""
    if act.activation != "swiglu_clamped":
        return gated(x, act.activation)
    gate, up = wide(x).chunk(2, dim=-1)
    gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
    return (gate * torch.sigmoid(act.alpha * gate) * (up + 1)).to(x.dtype)
