from __future__ import annotations

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.env import Env

EPS = 1e-5


def rms(shape: tuple[int, ...], scale: float, eps: float = EPS) -> object:
    def run(env: Env) -> Outputs:
        op = env.op("norm.rms", dims={"M": shape[-1]})
        return {"y": op(env.normal(*shape, scale=scale), env.normal(shape[-1]), eps)}

    return run


def add_rms(env: Env, rows: int, width: int) -> Outputs:
    op = env.op("norm.add_rms", dims={"M": width})
    y, residual = op(env.normal(rows, width), env.normal(rows, width, scale=3.0), env.normal(width), EPS)
    return {"y": y, "residual": residual}


def layer(env: Env, rows: int, width: int, bias: bool) -> Outputs:
    op = env.op("norm.layer", dims={"M": width})
    x, w = env.normal(rows, width, mean=3.0), env.normal(width)
    return {"y": op(x, w, env.normal(width) if bias else None, EPS)}


SHAPES: dict[str, tuple[tuple[int, ...], Profile]] = {
    "decode": ((4, 1024), "core"),
    "prefill": ((130, 512), "core"),
    "heads": ((7, 4, 128), "core"),
    "one row": ((1, 4096), "core"),
    "no rows": ((0, 64), "core"),
    "odd width": ((5, 333), "odd_sizes"),
}
for name, (shape, profile) in SHAPES.items():
    add(Case(op="norm.rms", name=name, run=rms(shape, 1.0), profile=profile))  # type: ignore[arg-type]
# eps matters where the row is small, and float32 where the squares of a half type overflow.
add(Case(op="norm.rms", name="small rows", run=rms((6, 256), 2e-3)))  # type: ignore[arg-type]
add(Case(op="norm.rms", name="large rows", run=rms((6, 256), 3e3)))  # type: ignore[arg-type]
add(Case(op="norm.add_rms", name="decode", run=lambda env: add_rms(env, 4, 1024)))
add(Case(op="norm.add_rms", name="prefill", run=lambda env: add_rms(env, 130, 512)))
add(Case(op="norm.add_rms", name="no rows", run=lambda env: add_rms(env, 0, 64)))
add(Case(op="norm.add_rms", name="odd width", run=lambda env: add_rms(env, 5, 333), profile="odd_sizes"))
add(Case(op="norm.layer", name="bias", run=lambda env: layer(env, 9, 512, True)))
add(Case(op="norm.layer", name="no bias", run=lambda env: layer(env, 9, 512, False)))
add(Case(op="norm.layer", name="odd width", run=lambda env: layer(env, 5, 37, True), profile="odd_sizes"))
