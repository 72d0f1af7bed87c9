"""Linear layers, gated activations, embedding lookup."""

from __future__ import annotations

from typing import Any

import torch

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.env import Env
from sglang_core.backend.kernel import OpSite


def linear(
    env: Env, rows: int, width: int, out: int, *, bias: bool = False, mean: float = 0.0, fmt: str = "dense"
) -> Outputs:
    facts: dict[str, Any] = {"fmt": fmt, "dims": {"in": width, "out": out}}
    op = env.op("gemm.linear", **facts)
    site = OpSite(op="gemm.linear", layer="Conformance", dtype=str(env.dtype).removeprefix("torch."), **facts)
    w = env.weight(out, width, site)
    return {"y": op(env.normal(rows, width, mean=mean), w, env.normal(out) if bias else None)}


for rows in (0, 1, 3, 17, 64, 300):
    add(Case(op="gemm.linear", name=f"{rows} rows", fmt="dense", run=lambda env, n=rows: linear(env, n, 256, 320)))
add(Case(op="gemm.linear", name="bias", fmt="dense", run=lambda env: linear(env, 5, 256, 128, bias=True)))
# A sum of 8192 terms of one sign mostly: an accumulator of a half type drowns.
add(Case(op="gemm.linear", name="long sums", fmt="dense", run=lambda env: linear(env, 4, 8192, 64)))
add(
    Case(
        op="gemm.linear",
        name="odd sizes",
        fmt="dense",
        run=lambda env: linear(env, 7, 67, 33, bias=True),
        profile="odd_sizes",
    )
)


def gated(env: Env, rows: int, width: int, kind: str) -> Outputs:
    op = env.op("act.gated", dims={"F": width})
    return {"y": op(env.normal(rows, 2 * width, scale=3.0), kind)}


for kind in ("silu", "gelu", "gelu_tanh"):
    add(Case(op="act.gated", name=kind, run=lambda env, k=kind: gated(env, 9, 768, k)))
    add(Case(op="act.gated", name=f"{kind}, no rows", run=lambda env, k=kind: gated(env, 0, 64, k)))
    add(Case(op="act.gated", name=f"{kind}, odd", run=lambda env, k=kind: gated(env, 3, 37, k), profile="odd_sizes"))


def lookup(env: Env, ids: torch.Tensor, start: int) -> Outputs:
    op = env.op("embed.lookup", dims={"V": 100, "M": 64})
    return {"rows": op(ids, env.normal(100, 64), start)}


add(Case(op="embed.lookup", name="whole", exact=("rows",), run=lambda env: lookup(env, env.integers(0, 100, 33), 0)))
add(Case(op="embed.lookup", name="a part", exact=("rows",), run=lambda env: lookup(env, env.integers(0, 300, 33), 100)))
add(Case(op="embed.lookup", name="no ids", exact=("rows",), run=lambda env: lookup(env, env.integers(0, 9, 0), 0)))
