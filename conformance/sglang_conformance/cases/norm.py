"""Normalisation: plain, with a gate, after adding a residual, and of layers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.cases.rows import Rows, Run, add_rows
from sglang_conformance.env import Env

EPS = 1e-5


def rms(shape: tuple[int, ...], scale: float = 1.0, *, wide_weight: bool = False) -> Callable[[Env], Outputs]:
    """`wide_weight`: in float32 whatever x is, as models keep it that store weight + 1."""

    def run(env: Env) -> Outputs:
        op = env.op("norm.rms", dims={"M": shape[-1]})
        x, weight = env.normal(*shape, scale=scale), env.normal(shape[-1])
        return {"y": op(x, env.place(weight.float().cpu() + 1e-3) if wide_weight else weight, EPS)}

    return run


def rms_of_zeros(env: Env) -> Outputs:
    op = env.op("norm.rms", dims={"M": 256})
    x = env.normal(4, 256)
    x[1:3] = 0.0
    return {"y": op(x, env.normal(256), EPS)}


def add_rms(env: Env, rows: int, width: int, scale: float = 1.0, *, wide_weight: bool = False) -> Outputs:
    op = env.op("norm.add_rms", dims={"M": width})
    x, residual, weight = (
        env.normal(rows, width, scale=scale),
        env.normal(rows, width, scale=3 * scale),
        env.normal(width),
    )
    weight = env.place(weight.float().cpu() + 1e-3) if wide_weight else weight
    y, residual = op(x, residual, weight, EPS)
    return {"y": y, "residual": residual}


def gated(shape: tuple[int, ...], scale: float = 1.0) -> Callable[[Env], Outputs]:
    """`scale`: of the gates."""

    def run(env: Env) -> Outputs:
        op = env.op("norm.rms_gated", dims={"M": shape[-1]})
        return {"y": op(env.normal(*shape), env.normal(*shape, scale=scale), env.normal(shape[-1]), EPS)}

    return run


def gate_of_a_projection(env: Env) -> Outputs:
    """x is dense; the heads of its gate lie side by side in the last columns of something wider, whose other columns are NaN."""
    heads, width = 4, 128
    op, weight = env.op("norm.rms_gated", dims={"M": width}), env.normal(width)
    gate = env.sliced(env.normal(7, heads * width), 256).unflatten(1, (heads, width))
    return {"y": op(env.normal(7, heads, width), gate, weight, EPS)}


def layer(env: Env, rows: int, width: int, bias: bool, *, mean: float = 3.0) -> Outputs:
    op = env.op("norm.layer", dims={"M": width})
    x, w = env.normal(rows, width, mean=mean), env.normal(width)
    return {"y": op(x, w, env.normal(width) if bias else None, EPS)}


SHAPES: dict[str, tuple[tuple[int, ...], Profile]] = {
    "decode": ((4, 1024), "core"),
    "prefill": ((130, 512), "core"),
    "heads": ((7, 4, 128), "core"),
    "no heads": ((0, 4, 128), "core"),
    "wide row": ((1, 4096), "core"),
    "odd width": ((5, 333), "odd_sizes"),
}
for name, (shape, profile) in SHAPES.items():
    add(Case(op="norm.rms", name=name, run=rms(shape), profile=profile))
# eps matters where the row is small, and float32 where the squares of a half type overflow.
add(Case(op="norm.rms", name="small rows", run=rms((6, 256), 2e-3)))
add(Case(op="norm.rms", name="large rows", run=rms((6, 256), 3e3)))
add(Case(op="norm.rms", name="rows of zeros", run=rms_of_zeros))
add(Case(op="norm.rms", name="float32 weight", run=rms((6, 256), wide_weight=True)))
for name, (shape, profile) in SHAPES.items():
    add(Case(op="norm.rms_gated", name=name, run=gated(shape), profile=profile))
# An exponential of the gate overflows here, and a gate of much below zero lets nothing through.
add(Case(op="norm.rms_gated", name="large gates", run=gated((6, 4, 64), 60.0)))
add(Case(op="norm.rms_gated", name="gate of a projection", run=gate_of_a_projection))
RESIDUAL = ("residual",)  # a rounded sum of two numbers: nothing about it is open
for name, (rows, width, profile) in {
    "decode": (4, 1024, "core"),
    "prefill": (130, 512, "core"),
    "odd width": (5, 333, "odd_sizes"),
}.items():
    add(
        Case(
            op="norm.add_rms",
            name=name,
            exact=RESIDUAL,
            run=lambda env, n=rows, w=width: add_rms(env, n, w),
            profile=profile,  # type: ignore[arg-type]
        )
    )
add(Case(op="norm.add_rms", name="large rows", exact=RESIDUAL, run=lambda env: add_rms(env, 6, 256, 1e3)))
add(
    Case(
        op="norm.add_rms",
        name="float32 weight",
        exact=RESIDUAL,
        run=lambda env: add_rms(env, 6, 256, wide_weight=True),
    )
)
add(Case(op="norm.layer", name="bias", run=lambda env: layer(env, 9, 512, True)))
add(Case(op="norm.layer", name="no bias", run=lambda env: layer(env, 9, 512, False)))
add(Case(op="norm.layer", name="odd width", run=lambda env: layer(env, 5, 37, True), profile="odd_sizes"))
# The mean of the squares less the square of the mean: nothing is left of it here.
add(
    Case(
        op="norm.layer",
        name="far from zero",
        dtypes=(torch.float32, torch.bfloat16),
        run=lambda env: layer(env, 6, 512, True, mean=500.0),
    )
)


def rms_rows(env: Env, rows: int, width: int = 512, heads: int = 0) -> tuple[Rows, Run]:
    """With `heads`, rows of so many heads: norms of queries and keys."""
    op, weight = env.op("norm.rms", dims={"M": width}), env.normal(width)
    shape = (rows, heads, width) if heads else (rows, width)
    return {"x": env.normal(*shape)}, lambda given: {"y": op(given["x"], weight, EPS)}


def gated_rows(env: Env, rows: int, width: int = 512, heads: int = 0) -> tuple[Rows, Run]:
    op, weight = env.op("norm.rms_gated", dims={"M": width}), env.normal(width)
    shape = (rows, heads, width) if heads else (rows, width)

    def run(given: Rows) -> Outputs:
        return {"y": op(given["x"], given["gate"], weight, EPS)}

    return {"x": env.normal(*shape), "gate": env.normal(*shape, scale=2.0)}, run


def add_rms_rows(env: Env, rows: int, width: int = 512) -> tuple[Rows, Run]:
    op, weight = env.op("norm.add_rms", dims={"M": width}), env.normal(width)

    def run(given: Rows) -> Outputs:
        y, residual = op(given["x"], given["residual"], weight, EPS)
        return {"y": y, "residual": residual}

    return {"x": env.normal(rows, width), "residual": env.normal(rows, width, scale=3.0)}, run


def layer_rows(env: Env, rows: int, width: int = 512) -> tuple[Rows, Run]:
    op, weight, bias = env.op("norm.layer", dims={"M": width}), env.normal(width), env.normal(width)
    return {"x": env.normal(rows, width, mean=3.0)}, lambda given: {"y": op(given["x"], weight, bias, EPS)}


add_rows(
    "norm.rms",
    rms_rows,
    odd=lambda env, rows: rms_rows(env, rows, 37),
    many=lambda env, rows: rms_rows(env, rows // 4, 64, heads=4),
)
add_rows(
    "norm.rms",
    lambda env, rows: rms_rows(env, rows, 64, heads=3),
    name="heads",
    odd=lambda env, rows: rms_rows(env, rows, 37, heads=3),
)
BOTH = ("x", "gate")
add_rows("norm.rms_gated", gated_rows, odd=lambda env, rows: gated_rows(env, rows, 37), poisoned=BOTH)
add_rows(
    "norm.rms_gated",
    lambda env, rows: gated_rows(env, rows, 64, heads=3),
    name="heads",
    odd=lambda env, rows: gated_rows(env, rows, 37, heads=3),
    many=lambda env, rows: gated_rows(env, rows // 4, 64, heads=4),
    poisoned=BOTH,
)
add_rows(
    "norm.add_rms",
    add_rms_rows,
    odd=lambda env, rows: add_rms_rows(env, rows, 37),
    many=lambda env, rows: add_rms_rows(env, rows, 32),
    poisoned=("x", "residual"),
    exact=RESIDUAL,
)
add_rows(
    "norm.layer",
    layer_rows,
    odd=lambda env, rows: layer_rows(env, rows, 41),
    many=lambda env, rows: layer_rows(env, rows, 32),
)
