"""Linear layers, gated activations, embedding lookup."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_conformance.case import HALVES, Case, Outputs, add, dtype_name
from sglang_conformance.cases.rows import NONE, ONE, TOGETHER, Rows, Run, add_rows
from sglang_conformance.env import Env
from sglang_core.backend.kernel import OpSite
from sglang_core.ops.activation import GateKind
from sglang_core.ops.weight import PackedWeight


def linear_site(env: Env, width: int, out: int, fmt: str = "dense") -> OpSite:
    dims = {"in": width, "out": out}
    return OpSite(op="gemm.linear", layer="Conformance", dtype=dtype_name(env.dtype), fmt=fmt, dims=dims)


def linear_rows(
    env: Env,
    rows: int,
    width: int = 256,
    out: int = 192,
    *,
    bias: bool = True,
    mean: float = 0.0,
    fmt: str = "dense",
    weight: PackedWeight | None = None,
) -> tuple[Rows, Run]:
    """`weight`: canonical, where it is not to be a random one."""
    site = linear_site(env, width, out, fmt)
    op = env.op("gemm.linear", fmt=fmt, dims=site.dims)
    w = env.packed(weight or env.canonical(fmt, out, width), site)
    x, b = env.normal(rows, width, mean=mean), env.normal(out) if bias else None
    return {"x": x}, lambda given: {"y": op(given["x"], w, b)}


def linear(env: Env, rows: int, width: int = 256, out: int = 320, *, bias: bool = False, **more: Any) -> Outputs:
    given, run = linear_rows(env, rows, width, out, bias=bias, **more)
    return run(given)


def three_dims(env: Env) -> Outputs:
    """x: [R, S, in], as a tower of images gives it; and one row of one dim."""
    given, run = linear_rows(env, 12)
    x = given["x"]
    return {"batches": run({"x": x.view(3, 4, -1)})["y"], "a vector": run({"x": x[0]})["y"]}


def add_linear(name: str, rows: int, width: int = 256, out: int = 320, **more: Any) -> None:
    facts = {key: more.pop(key) for key in ("profile", "full") if key in more}
    add(Case(op="gemm.linear", name=name, fmt="dense", run=lambda env: linear(env, rows, width, out, **more), **facts))


for rows in (0, 1, 3, 17, 64, 300):
    add_linear(f"{rows} rows", rows)
add_linear("bias", 5, out=128, bias=True)
# A sum of 8192 terms of one sign mostly: an accumulator of a half type drowns.
add_linear("long sums", 4, 8192, 64, mean=1.0)
add_linear("very long sums", 3, 30_000, 64, mean=1.0, full=True)
add_linear("one column in", 3, 1, 64, profile="odd_sizes")
add_linear("one column out", 3, 256, 1, profile="odd_sizes")
add_linear("odd sizes", 7, 67, 33, bias=True, profile="odd_sizes")
add_linear("a wide head", 2, 64, 70_000, full=True)
add(Case(op="gemm.linear", name="three dims and one", fmt="dense", run=three_dims))
add_rows(
    "gemm.linear",
    linear_rows,
    odd=lambda env, rows: linear_rows(env, rows, 67, 33),
    many=lambda env, rows: linear_rows(env, rows, 32, 16),
    fmt="dense",
)


def linear_gated_rows(
    env: Env,
    rows: int,
    width: int = 256,
    half: int = 192,
    *,
    kind: GateKind = "silu",
    bias: bool = True,
    fmt: str = "dense",
) -> tuple[Rows, Run]:
    """`half`: columns of gates, and of what they open."""
    dims = {"in": width, "out": 2 * half, "F": half}
    op = env.op("gemm.linear_gated", spec=kind, fmt=fmt, dims=dims)
    site = replace(linear_site(env, width, 2 * half, fmt), op="gemm.linear_gated", spec=kind, dims=dims)
    w, x = env.weight(2 * half, width, site), env.normal(rows, width)
    b = env.normal(2 * half) if bias else None
    return {"x": x}, lambda given: {"y": op(given["x"], w, kind, b)}


def linear_gated(env: Env, rows: int, *sizes: int, **more: Any) -> Outputs:
    given, run = linear_gated_rows(env, rows, *sizes, **more)
    return run(given)


def gated_three_dims(env: Env) -> Outputs:
    given, run = linear_gated_rows(env, 12)
    x = given["x"]
    return {"batches": run({"x": x.view(3, 4, -1)})["y"], "a vector": run({"x": x[0]})["y"]}


WHOLE = "gemm.linear_gated"
for rows in (0, 1, 3, 17, 64, 300):
    add(Case(op=WHOLE, name=f"{rows} rows", fmt="dense", run=lambda env, n=rows: linear_gated(env, n, bias=n == 17)))
for kind in ("gelu", "gelu_tanh"):
    add(Case(op=WHOLE, name=kind, fmt="dense", run=lambda env, k=kind: linear_gated(env, 5, kind=k)))
add(Case(op=WHOLE, name="odd sizes", fmt="dense", profile="odd_sizes", run=lambda env: linear_gated(env, 7, 67, 33)))
add(Case(op=WHOLE, name="one gate", fmt="dense", profile="odd_sizes", run=lambda env: linear_gated(env, 3, 256, 1)))
add(Case(op=WHOLE, name="three dims and one", fmt="dense", run=gated_three_dims))
add_rows(
    WHOLE,
    linear_gated_rows,
    odd=lambda env, rows: linear_gated_rows(env, rows, 67, 33),
    many=lambda env, rows: linear_gated_rows(env, rows, 32, 16),
    fmt="dense",
)


def gated_rows(env: Env, rows: int, width: int = 768, kind: str = "silu") -> tuple[Rows, Run]:
    op = env.op("act.gated", dims={"F": width})
    return {"x": env.normal(rows, 2 * width, scale=3.0)}, lambda given: {"y": op(given["x"], kind)}


def gated(env: Env, rows: int, width: int, kind: str, *, gates: float = 1.0) -> Outputs:
    """`gates`: how much larger gates are. Their exponentials overflow; what comes of it is zero, or the gate itself."""
    given, run = gated_rows(env, rows, width, kind)
    given["x"][:, :width] *= gates
    return run(given)


for kind in ("silu", "gelu", "gelu_tanh"):
    add(Case(op="act.gated", name=kind, run=lambda env, k=kind: gated(env, 9, 768, k)))
    add(Case(op="act.gated", name=f"{kind}, large gates", run=lambda env, k=kind: gated(env, 9, 64, k, gates=256.0)))
    add(Case(op="act.gated", name=f"{kind}, odd", run=lambda env, k=kind: gated(env, 3, 37, k), profile="odd_sizes"))
    add_rows(
        "act.gated",
        lambda env, rows, k=kind: gated_rows(env, rows, 768, k),
        name=kind,
        odd=lambda env, rows, k=kind: gated_rows(env, rows, 37, k),
        many=(lambda env, rows: gated_rows(env, rows, 16)) if kind == "silu" else None,
    )

EXACT = ("rows",)


def lookup(env: Env, ids: Tensor, start: int) -> Outputs:
    """Rows of the table that nobody asks for are NaN: what is outside is zeros, not some row times zero."""
    table = env.normal(100, 64)
    asked = torch.zeros(100, dtype=torch.bool)
    local = ids.cpu() - start
    asked[local[(local >= 0) & (local < 100)].long()] = True
    table[(~asked).nonzero().flatten().to(table.device)] = float("nan")
    return {"rows": env.op("embed.lookup", dims={"V": 100, "M": 64})(ids, table, start)}


def lookup_rows(env: Env, rows: int, width: int = 64) -> tuple[Rows, Run]:
    op, table = env.op("embed.lookup", dims={"V": 100, "M": width}), env.normal(100, width)
    return {"ids": env.integers(0, 100, rows)}, lambda given: {"rows": op(given["ids"], table, 0)}


def far_lookup(env: Env) -> Outputs:
    """The end of a table of 2^31 elements and more: id times width does not fit 32 bits. Most of it is never touched."""
    width, last = 1024, 8
    first = env.far(2**31 // width)
    table = env.vast(first + last, width)
    table[first:] = env.normal(last, width)
    table[:last] = float("nan")
    ids = env.place((torch.tensor([7, 0, 3, 3]) + first).int())
    return {"rows": env.op("embed.lookup", dims={"V": len(table), "M": width})(ids, table, 0)}


add(Case(op="embed.lookup", name="whole", exact=EXACT, run=lambda env: lookup(env, env.integers(0, 100, 33), 0)))
add(Case(op="embed.lookup", name="a part", exact=EXACT, run=lambda env: lookup(env, env.integers(0, 300, 33), 100)))
add(
    Case(
        op="embed.lookup",
        name="nobody's part",
        exact=EXACT,
        run=lambda env: lookup(env, env.place(torch.tensor([0, 99, 200, 299, -1]).int()), 100),
    )
)
add(Case(op="embed.lookup", name="rows past 2^31 elements", exact=EXACT, dtypes=HALVES, full=True, run=far_lookup))
add_rows(
    "embed.lookup",
    lookup_rows,
    odd=lambda env, rows: lookup_rows(env, rows, 37),
    many=lambda env, rows: lookup_rows(env, rows, 8),
    poisoned=(),
    exact=EXACT,
    relations=(TOGETHER, ONE, NONE),
)
