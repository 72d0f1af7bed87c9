"""Mixture of experts: grouped products and fused experts. Routing is in `moe_route`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang_conformance.case import HALVES, Case, Outputs, Profile, add, dtype_name
from sglang_conformance.cases.rows import NONE, ONE, PADDED, SLICED, TOGETHER, Rows, Run, add_rows
from sglang_conformance.env import Env
from sglang_core.backend.kernel import OpSite
from sglang_core.ops.gemm import dense
from sglang_core.ops.moe import ExpertSpec


def site(env: Env, op: str, facts: dict[str, Any]) -> OpSite:
    return OpSite(op=op, layer="Conformance", dtype=dtype_name(env.dtype), **facts)


def grouped(
    env: Env,
    sizes: tuple[int, ...],
    width: int = 128,
    out: int = 96,
    *,
    bias: bool = False,
    past: int = 0,
    fmt: str = "dense",
) -> Outputs:
    """`past` rows belong to no group, and hold NaN."""
    x, sums = env.normal(sum(sizes) + past, width), env.place(torch.tensor(sizes, dtype=torch.int32))
    x[sum(sizes) :] = float("nan")
    op, w, b = grouped_op(env, len(sizes), width, out, bias=bias, fmt=fmt)
    return {"y": op(x, w, sums, b)}


def grouped_op(env: Env, num: int, width: int, out: int, *, bias: bool = False, fmt: str = "dense") -> Any:
    """The op, the weights of `num` groups, and their bias."""
    facts: dict[str, Any] = {"fmt": fmt, "dims": {"X": num, "in": width, "out": out}}
    op = env.op("gemm.grouped", **facts)
    w = env.experts(num, out, width, site(env, "gemm.grouped", facts))
    return op, w, env.normal(num, out) if bias else None


def grouped_rows(env: Env, rows: int, width: int = 128, out: int = 96) -> tuple[Rows, Run]:
    """Rows with the group of each beside them, in order."""
    num = 4
    op, w, bias = grouped_op(env, num, width, out, bias=True)

    def run(given: Rows) -> Outputs:
        sizes = torch.bincount(given["group"].long().cpu(), minlength=num).int()
        return {"y": op(given["x"], w, env.place(sizes), bias)}

    return {"x": env.normal(rows, width), "group": env.integers(0, num, rows).sort().values}, run


GROUPS: dict[str, tuple[tuple[int, ...], dict[str, Any], Profile]] = {
    "decode": ((1, 0, 0, 1, 2, 0), {}, "core"),
    "prefill": ((40, 0, 70, 1), {}, "core"),
    "bias": ((3, 0, 9), {"bias": True}, "core"),
    "rows of no group": ((3, 0, 9), {"past": 5, "bias": True}, "core"),
    "only rows of no group": ((0, 0, 0), {"past": 5, "bias": True}, "core"),
    "all in one": ((0, 130), {}, "core"),
    "odd sizes": ((5, 2, 0), {"width": 67, "out": 33, "bias": True}, "odd_sizes"),
}
for name, (sizes, more, profile) in GROUPS.items():
    add(
        Case(
            op="gemm.grouped",
            name=name,
            fmt="dense",
            profile=profile,
            run=lambda env, s=sizes, g=more: grouped(env, s, **g),
        )
    )
add_rows(
    "gemm.grouped",
    grouped_rows,
    odd=lambda env, rows: grouped_rows(env, rows, 67, 33),
    many=lambda env, rows: grouped_rows(env, rows, 16, 8),
    fmt="dense",
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
    same: bool = False,
    fmt: str = "dense",
) -> Outputs:
    """`same`: every token goes to the same experts, and none to the others."""
    given, run = fused_rows(
        env, rows, act, num_experts=num_experts, k=k, hidden=hidden, width=width, bias=bias, remote=remote, fmt=fmt
    )
    if same:
        given["ids"] = given["ids"][:1].expand(rows, -1).contiguous()
    return run(given)


def fused_rows(
    env: Env,
    rows: int,
    act: ExpertSpec | None = None,
    *,
    num_experts: int = 8,
    k: int = 2,
    hidden: int = 128,
    width: int = 96,
    bias: bool = False,
    remote: bool = False,
    fmt: str = "dense",
) -> tuple[Rows, Run]:
    """Each token's experts are distinct. `remote`: every third expert is another rank's, and the rest are stored backwards;
    all experts of the first token are remote."""
    act = act or ExpertSpec()
    local = [e for e in range(num_experts) if not (remote and e % 3 == 0)]
    dims = {"X": len(local), "K": k, "M": hidden, "F": width}
    facts: dict[str, Any] = {"fmt": fmt, "spec": act, "dims": dims}
    op, at = env.op("moe.fused", **facts), site(env, "moe.fused", facts)
    w13, w2 = (env.experts(len(local), *shape, at) for shape in ((2 * width, hidden), (hidden, width)))
    more: dict[str, Tensor] = {}
    if bias:
        more = {"bias13": env.normal(len(local), 2 * width), "bias2": env.normal(len(local), hidden)}
    chosen = token_experts(env, rows, num_experts, k)
    if remote:
        order = {e: len(local) - 1 - i for i, e in enumerate(local)}
        more["expert_map"] = env.place(torch.tensor([order.get(e, -1) for e in range(num_experts)], dtype=torch.int32))
        chosen["ids"][:1] = env.place(torch.arange(0, 3 * k, 3, dtype=torch.int32))

    def run(given: Rows) -> Outputs:
        return {"y": op(given["x"], w13, w2, given["weights"], given["ids"], act, **more)}

    return {"x": env.normal(rows, hidden, scale=0.2)} | chosen, run


def token_experts(env: Env, rows: int, num_experts: int, k: int) -> Rows:
    """What a router gives: each token's weights, and k experts that are distinct."""
    ids = torch.stack([env.permutation(num_experts)[:k] for _ in range(rows)]) if rows else torch.zeros(0, k)
    weights = torch.rand(rows, k, generator=torch.Generator().manual_seed(rows)) + 0.1
    return {"weights": env.place(weights), "ids": env.place(ids.int())}


def far_experts(env: Env) -> Outputs:
    """Experts whose places do not fit 32 bits: of 2^31 weights, those of a few experts are not zeros."""
    hidden, width, k, last = 2048, 1024, 2, 4
    num = env.far(2**31 // (2 * width * hidden)) + last
    facts: dict[str, Any] = {"fmt": "dense", "spec": SILU, "dims": {"X": num, "K": k, "M": hidden, "F": width}}
    op, at = env.op("moe.fused", **facts), site(env, "moe.fused", facts)

    def stack(out: int, columns: int) -> Any:
        w = env.vast(num, out, columns)
        w[-last:] = env.normal(last, out, columns, scale=columns**-0.5)
        return env.packed(dense(w), at, checked=False)

    w13, w2 = stack(2 * width, hidden), stack(hidden, width)
    given = token_experts(env, 3, last, k)
    ids = given["ids"] + (num - last)
    return {"y": op(env.normal(3, hidden), w13, w2, given["weights"], ids.int(), SILU)}


SILU, OAI = ExpertSpec(), ExpertSpec(activation="swiglu_clamped")
FUSED: dict[str, tuple[int, ExpertSpec, dict[str, Any], Profile]] = {
    "decode": (1, SILU, {}, "core"),
    "a batch": (7, SILU, {}, "core"),
    "prefill": (150, SILU, {}, "core"),
    "many experts": (3, SILU, {"num_experts": 64, "k": 8}, "core"),
    "one expert a token": (9, SILU, {"k": 1}, "core"),
    "every token to the same experts": (130, SILU, {"same": True}, "core"),
    "gelu": (7, ExpertSpec(activation="gelu"), {}, "core"),
    "gelu_tanh": (7, ExpertSpec(activation="gelu_tanh"), {}, "core"),
    "clamped, biased": (7, OAI, {"bias": True}, "core"),
    "clamped lower, another alpha": (7, ExpertSpec(activation="swiglu_clamped", alpha=1.0, limit=1.5), {}, "core"),
    "weight on the input": (7, ExpertSpec(weight_on_input=True), {"k": 1}, "core"),
    "weight on the input, biased": (7, ExpertSpec(weight_on_input=True), {"bias": True}, "core"),
    "remote experts": (33, SILU, {"remote": True, "num_experts": 10, "k": 3}, "core"),
    "remote experts, biased": (2, OAI, {"remote": True, "bias": True}, "core"),
    "every expert is remote": (1, OAI, {"remote": True, "bias": True}, "core"),
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
add(
    Case(
        op="moe.fused",
        name="experts past 2^31 elements",
        fmt="dense",
        dtypes=HALVES,
        full=True,
        run=far_experts,
    )
)
add_rows(
    "moe.fused",
    lambda env, rows: fused_rows(env, rows, OAI, bias=True),
    odd=lambda env, rows: fused_rows(env, rows, OAI, hidden=67, width=33, bias=True),
    relations=(TOGETHER, PADDED, SLICED, ONE, NONE),
    fmt="dense",
)
