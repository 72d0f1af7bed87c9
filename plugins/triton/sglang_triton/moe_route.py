"""moe.route: scores, groups, the best experts and their weights, in one pass over the router's logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api.ops import RouteSpec
from sglang_triton.aot_spec import AotSpec
from sglang_triton.numerics import sigmoid, widen
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn

TINY = tl.constexpr(1e-20)  # added to a sum of weights, as sglang_core.ops.moe has it


def route(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits: [T, X], bias: float32[X] -> weights: float32[T, K], ids: int32[T, K], the best first; equals rank by id."""
    num_tokens, device = logits.shape[0], logits.device
    weights = torch.empty(num_tokens, spec.top_k, dtype=torch.float32, device=device)
    ids = torch.empty(num_tokens, spec.top_k, dtype=torch.int32, device=device)
    if num_tokens:
        logits, config = dense_last(logits), choose("moe.route", X=spec.num_experts)
        _route[(triton.cdiv(num_tokens, config["BLOCK_T"]),)](
            logits,
            logits if bias is None else bias,
            weights,
            ids,
            num_tokens,
            logits.stride(0),
            spec.scale,
            **_constexprs(spec),
            **config,
        )
    return weights, ids


def _constexprs(spec: RouteSpec) -> dict[str, object]:
    return {
        "X": spec.num_experts,
        "K": spec.top_k,
        "SCORING": spec.scoring,
        "GROUPS": spec.num_groups,
        "TOP_GROUPS": spec.top_groups,
        "BEST_TWO": spec.group_score == "top2_sum",
        "HAS_BIAS": spec.has_bias,
        "RENORMALIZE": spec.renormalize,
        "BLOCK_X": triton.next_power_of_2(spec.num_experts),
        "BLOCK_K": triton.next_power_of_2(spec.top_k),
        "BLOCK_G": triton.next_power_of_2(spec.num_groups),
    }


@triton.jit
def _route(
    logits,
    bias,
    weights,
    ids,
    T,
    stride,
    scale,
    X: tl.constexpr,
    K: tl.constexpr,
    SCORING: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_TWO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: BLOCK_T tokens and all experts."""
    take_turn()
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    expert = tl.arange(0, BLOCK_X)[None, :]
    inside = (token < T) & (expert < X)
    x = widen(tl.load(logits + token * stride + expert, inside, other=0.0))
    x = tl.where(expert < X, x, float("-inf"))
    if SCORING == "softmax":
        mass = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
        scores = mass / tl.sum(mass, axis=1, keep_dims=True)
    elif SCORING == "sigmoid":
        scores = sigmoid(x)
    else:
        scores = x
    choice = tl.where(expert < X, scores, float("-inf"))
    if HAS_BIAS:
        choice += widen(tl.load(bias + expert, expert < X, other=0.0))
    if TOP_GROUPS < GROUPS:
        choice = of_top_groups(choice, expert, X // GROUPS, GROUPS, TOP_GROUPS, BEST_TWO, BLOCK_T, BLOCK_G)
    place = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    weight = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    left = expert < X
    for k in tl.static_range(K):
        best = first_best(choice, expert, left, X)
        chosen = tl.where(place == k, best, chosen)
        weight = tl.where(place == k, tl.sum(tl.where(expert == best, scores, 0.0), axis=1, keep_dims=True), weight)
        left = left & (expert != best)
    if SCORING == "softmax_after_top_k":
        mass = tl.exp(weight - tl.max(weight, axis=1, keep_dims=True))
        weight = mass / tl.sum(mass, axis=1, keep_dims=True)
    if RENORMALIZE:
        weight = weight / (tl.sum(tl.where(place < K, weight, 0.0), axis=1, keep_dims=True) + TINY)
    there = (token < T) & (place < K)
    tl.store(weights + token * K + place, weight * scale, there)
    tl.store(ids + token * K + place, chosen, there)


@triton.jit
def first_best(x, index, left, END):
    """x: float32[m, n], index: int32[1, n] -> int32[m, 1]: where the largest of what is left stands, the first of equals."""
    top = tl.max(tl.where(left, x, float("-inf")), axis=1, keep_dims=True)
    # A row of NaN has no largest; it is padding, and gets the last.
    return tl.min(tl.where(left & (x == top), index, END - 1), axis=1, keep_dims=True)


@triton.jit
def of_top_groups(
    choice,
    expert,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_TWO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """choice, with -inf in place of what is in none of the best groups."""
    group = tl.arange(0, BLOCK_G)[None, :]
    score = tl.full([BLOCK_T, BLOCK_G], float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        mine = expert // SIZE == g
        most = tl.max(tl.where(mine, choice, float("-inf")), axis=1, keep_dims=True)
        if BEST_TWO:
            first = first_best(choice, expert, mine, (g + 1) * SIZE)
            most += tl.max(tl.where(mine & (expert != first), choice, float("-inf")), axis=1, keep_dims=True)
        score = tl.where(group == g, most, score)
    left = (group < GROUPS) & (score == score)
    kept = choice < float("-inf")  # none yet
    for _ in tl.static_range(TOP_GROUPS):
        best = first_best(score, group, left, GROUPS)
        kept = kept | (expert // SIZE == best)
        left = left & (group != best)
    return tl.where(kept, choice, float("-inf"))


_SPECS = {
    "softmax, 8 of 128": RouteSpec(num_experts=128, top_k=8, renormalize=True),
    "groups, 8 of 256": RouteSpec(
        num_experts=256,
        top_k=8,
        scoring="sigmoid",
        num_groups=8,
        top_groups=4,
        group_score="top2_sum",
        has_bias=True,
        renormalize=True,
        scale=2.5,
    ),
    "after top-k, 4 of 32": RouteSpec(num_experts=32, top_k=4, scoring="softmax_after_top_k"),
}
AOT = tuple(
    AotSpec(
        op="moe.route",
        name=name,
        kernel=_route,
        signature={
            "logits": "*bf16",
            "bias": "*fp32",
            "weights": "*fp32",
            "ids": "*i32",
            "T": "i32",
            "stride": "i32",
            "scale": "fp32",
        },
        constexprs=_constexprs(spec),
        sizes={"X": spec.num_experts},
        odd=("T",),
    )
    for name, spec in _SPECS.items()
)
