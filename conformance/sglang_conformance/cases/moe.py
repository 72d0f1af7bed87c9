"""Mixture of experts: routing, grouped products, fused experts."""

from __future__ import annotations

from typing import Any

import torch

from sglang_conformance.case import Case, Outputs, Profile, add, dtype_name
from sglang_conformance.env import Env
from sglang_core.backend.kernel import OpSite
from sglang_core.ops.moe import ExpertSpec, RouteSpec

# What published models route by.
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


def route(env: Env, spec: RouteSpec, rows: int) -> Outputs:
    """With a bias, every selection score is below zero: what masks other groups with zero chooses them."""
    op = env.op("moe.route", spec=spec, dims={"X": spec.num_experts, "K": spec.top_k})
    logits = env.normal(rows, spec.num_experts, scale=2.0)
    bias = env.normal(spec.num_experts, scale=0.5, mean=-3.0).to(wide(env)) if spec.has_bias else None
    weights, ids = op(logits, spec, bias)
    return {"weights": weights, "ids": ids}


def wide(env: Env) -> torch.dtype:
    """float32 on a device and in the body; the oracle stays in float64."""
    return torch.promote_types(env.place(torch.zeros(1, dtype=torch.float32)).dtype, torch.float32)


def equal_scores(env: Env) -> Outputs:
    """Of equal scores the lower id, in groups as well; logits of a half type are equal often."""
    spec = RouteSpec(num_experts=12, top_k=3, num_groups=3, top_groups=2)
    op = env.op("moe.route", spec=spec, dims={"X": 12, "K": 3})
    logits = env.floats(torch.tensor([[1.0] * 12, [0.0, 2, 2, 1] * 3, [0.0] * 8 + [1.0] * 4]))
    return {"ids": op(logits, spec, None)[1]}


for name, spec in ROUTES.items():
    for rows in (0, 1, 77):
        add(Case(op="moe.route", name=f"{name}, {rows} rows", run=lambda env, s=spec, n=rows: route(env, s, n)))
add(Case(op="moe.route", name="equal scores", run=equal_scores))


def grouped(
    env: Env, sizes: tuple[int, ...], width: int, out: int, *, bias: bool = False, past: int = 0, fmt: str = "dense"
) -> Outputs:
    """`past` rows belong to no group."""
    facts: dict[str, Any] = {"fmt": fmt, "dims": {"X": len(sizes), "in": width, "out": out}}
    op = env.op("gemm.grouped", **facts)
    w = env.experts(len(sizes), out, width, site(env, "gemm.grouped", facts))
    group_sizes = env.place(torch.tensor(sizes, dtype=torch.int32))
    x = env.normal(sum(sizes) + past, width)
    return {"y": op(x, w, group_sizes, env.normal(len(sizes), out) if bias else None)}


def site(env: Env, op: str, facts: dict[str, Any]) -> OpSite:
    dtype = dtype_name(env.dtype)
    return OpSite(op=op, layer="Conformance", dtype=dtype, **facts)


GROUPS: dict[str, tuple[tuple[int, ...], dict[str, Any], Profile]] = {
    "decode": ((1, 0, 0, 1, 2, 0), {}, "core"),
    "prefill": ((40, 0, 70, 1), {}, "core"),
    "bias": ((3, 0, 9), {"bias": True}, "core"),
    "rows of no group": ((3, 0, 9), {"past": 5, "bias": True}, "core"),
    "all in one": ((0, 130), {}, "core"),
    "no rows": ((0, 0), {}, "core"),
    "odd sizes": ((5, 2, 0), {"width": 67, "out": 33, "bias": True}, "odd_sizes"),
}
for name, (sizes, more, profile) in GROUPS.items():
    given = {"width": 128, "out": 96} | more
    add(
        Case(
            op="gemm.grouped",
            name=name,
            fmt="dense",
            profile=profile,
            run=lambda env, s=sizes, g=given: grouped(env, s, **g),
        )
    )


def fused(
    env: Env,
    rows: int,
    act: ExpertSpec,
    *,
    num_experts: int = 8,
    k: int = 2,
    hidden: int = 128,
    width: int = 96,
    bias: bool = False,
    remote: bool = False,
    fmt: str = "dense",
) -> Outputs:
    """Each token's experts are distinct. `remote`: every third expert is another rank's, and the rest are stored backwards."""
    local = [e for e in range(num_experts) if not (remote and e % 3 == 0)]
    dims = {"X": len(local), "K": k, "M": hidden, "F": width}
    facts: dict[str, Any] = {"fmt": fmt, "spec": act, "dims": dims}
    op, at = env.op("moe.fused", **facts), site(env, "moe.fused", facts)
    w13, w2 = (env.experts(len(local), *shape, at) for shape in ((2 * width, hidden), (hidden, width)))
    ids = torch.stack([env.permutation(num_experts)[:k] for _ in range(rows)]) if rows else torch.zeros(0, k)
    weights = env.place(torch.rand(rows, k, generator=torch.Generator().manual_seed(rows)) + 0.1)
    given: dict[str, Any] = {}
    if bias:
        given = {"bias13": env.normal(len(local), 2 * width), "bias2": env.normal(len(local), hidden)}
    if remote:
        order = {e: len(local) - 1 - i for i, e in enumerate(local)}
        given["expert_map"] = env.place(torch.tensor([order.get(e, -1) for e in range(num_experts)], dtype=torch.int32))
    return {"y": op(env.normal(rows, hidden, scale=0.2), w13, w2, weights, env.place(ids.int()), act, **given)}


SILU, OAI = ExpertSpec(), ExpertSpec(activation="swiglu_clamped")
FUSED: dict[str, tuple[int, ExpertSpec, dict[str, Any], Profile]] = {
    "decode": (1, SILU, {}, "core"),
    "a batch": (7, SILU, {}, "core"),
    "prefill": (150, SILU, {}, "core"),
    "no rows": (0, SILU, {}, "core"),
    "many experts": (3, SILU, {"num_experts": 64, "k": 8}, "core"),
    "one expert a token": (9, SILU, {"k": 1}, "core"),
    "gelu": (7, ExpertSpec(activation="gelu"), {}, "core"),
    "gelu_tanh": (7, ExpertSpec(activation="gelu_tanh"), {}, "core"),
    "clamped, biased": (7, OAI, {"bias": True}, "core"),
    "clamped lower, another alpha": (7, ExpertSpec(activation="swiglu_clamped", alpha=1.0, limit=1.5), {}, "core"),
    "weight on the input": (7, ExpertSpec(weight_on_input=True), {"k": 1}, "core"),
    "weight on the input, biased": (7, ExpertSpec(weight_on_input=True), {"bias": True}, "core"),
    "remote experts": (33, SILU, {"remote": True, "num_experts": 10, "k": 3}, "core"),
    "remote experts, biased": (2, OAI, {"remote": True, "bias": True}, "core"),
    "odd sizes": (5, SILU, {"hidden": 67, "width": 33, "bias": True}, "odd_sizes"),
}
for name, (rows, act, more, profile) in FUSED.items():
    add(
        Case(
            op="moe.fused",
            name=name,
            fmt="dense",
            profile=profile,
            run=lambda env, n=rows, a=act, m=more: fused(env, n, a, **m),
        )
    )
