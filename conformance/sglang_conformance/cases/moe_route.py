"""Routing: which experts a token goes to, by the rules of published models."""

from __future__ import annotations

import torch

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.cases.rows import NONE, ONE, PADDED, SLICED, TOGETHER, Rows, Run, add_rows
from sglang_conformance.env import Env
from sglang_core.ops.moe import RouteSpec

ROUTES: dict[str, RouteSpec] = {
    "softmax, renormalised": RouteSpec(num_experts=8, top_k=2, renormalize=True),
    "softmax": RouteSpec(num_experts=60, top_k=4),
    "many experts": RouteSpec(num_experts=128, top_k=8, renormalize=True),
    "softmax after top-k": RouteSpec(num_experts=32, top_k=4, scoring="softmax_after_top_k"),
    "best of a group": RouteSpec(num_experts=64, top_k=6, num_groups=8, top_groups=3, scale=16.0),
    "best two of a group, biased": RouteSpec(
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
    "one expert, sigmoid": RouteSpec(num_experts=16, top_k=1, scoring="sigmoid"),
}


def route_rows(env: Env, rows: int, spec: RouteSpec, mean: float = 0.0) -> tuple[Rows, Run]:
    """With a bias, every selection score is below zero: what masks other groups with zero chooses them."""
    op = env.op("moe.route", spec=spec, dims={"X": spec.num_experts, "K": spec.top_k})
    bias = env.normal(spec.num_experts, scale=0.5, mean=-3.0).to(wide(env)) if spec.has_bias else None

    def run(given: Rows) -> Outputs:
        weights, ids = op(given["logits"], spec, bias)
        return {"weights": weights, "ids": ids}

    return {"logits": env.normal(rows, spec.num_experts, scale=2.0, mean=mean)}, run


def wide(env: Env) -> torch.dtype:
    """float32 on a device and in the body; the oracle stays in float64."""
    return torch.promote_types(env.place(torch.zeros(1, dtype=torch.float32)).dtype, torch.float32)


def route(env: Env, spec: RouteSpec, rows: int, mean: float = 0.0) -> Outputs:
    given, run = route_rows(env, rows, spec, mean)
    return run(given)


def equal_scores(env: Env) -> Outputs:
    """Of equal scores the lower id, in groups as well; logits of a half type are equal often."""
    spec = RouteSpec(num_experts=12, top_k=3, num_groups=3, top_groups=2)
    op = env.op("moe.route", spec=spec, dims={"X": 12, "K": 3})
    logits = env.floats(torch.tensor([[1.0] * 12, [0.0, 2, 2, 1] * 3, [0.0] * 8 + [1.0] * 4]))
    return {"ids": op(logits, spec, None)[1]}


for name, spec in ROUTES.items():
    add(Case(op="moe.route", name=f"{name}, 77 rows", run=lambda env, s=spec: route(env, s, 77)))
    add_rows(
        "moe.route",
        lambda env, rows, s=spec: route_rows(env, rows, s),
        name=name,
        poisoned=("logits",),
        relations=(TOGETHER, PADDED, SLICED, ONE, NONE) if spec.has_bias or spec.num_experts == 8 else (ONE, NONE),
    )
# Exponentials of such logits overflow float32, or vanish, where the largest is not taken off first.
for name in ("softmax, renormalised", "softmax", "softmax after top-k"):
    for mean in (-300.0, 300.0):
        add(
            Case(
                op="moe.route",
                name=f"{name}, logits about {mean:g}",
                run=lambda env, s=ROUTES[name], m=mean: route(env, s, 9, m),
            )
        )
odd = RouteSpec(num_experts=11, top_k=3)
add_rows(
    "moe.route",
    lambda env, rows: route_rows(env, rows, odd),
    name="eleven experts",
    odd=lambda env, rows: route_rows(env, rows, odd),
    many=lambda env, rows: route_rows(env, rows, odd),
    poisoned=("logits",),
    relations=(),
)
add(Case(op="moe.route", name="equal scores", run=equal_scores))
