"""Rotary position embedding in both styles, of all and of some dims, near and far."""

from __future__ import annotations

import torch

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.cases.rows import Rows, Run, add_rows
from sglang_conformance.env import Env
from sglang_core.ops.rope import RopeSpec, rope_table

LENGTH = 2048
LONG = 131_072


def rotate(env: Env, spec: RopeSpec, tokens: int, *, heads: int = 8, kv_heads: int = 2) -> Outputs:
    rows, run = rope_rows(env, tokens, spec, heads, kv_heads)
    return run(rows)


def rope_rows(env: Env, rows: int, spec: RopeSpec | None = None, heads: int = 8, kv_heads: int = 2) -> tuple[Rows, Run]:
    spec = spec or SPECS["neox"][0]
    op = env.op("rope.apply", spec=spec, dims={"D": spec.head_dim})
    table = env.place(rope_table(spec, LENGTH))

    def run(given: Rows) -> Outputs:
        q, k = op(given["q"], given["k"], given["positions"], table, spec)
        return {"q": q, "k": k}

    q, k = env.normal(rows, heads, spec.head_dim), env.normal(rows, kv_heads, spec.head_dim)
    return {"q": q, "k": k, "positions": env.integers(0, LENGTH, rows)}, run


def ends(env: Env) -> Outputs:
    """The first and the last position of a long table, twice each, and one past what 16 bits hold."""
    spec = SPECS["neox, 64"][0]
    op = env.op("rope.apply", spec=spec, dims={"D": spec.head_dim})
    positions = env.place(torch.tensor([0, LONG - 1, 70_000, 0, LONG - 1, 65_536, 1], dtype=torch.int32))
    q, k = op(env.normal(7, 4, 64), env.normal(7, 2, 64), positions, env.place(rope_table(spec, LONG)), spec)
    return {"q": q, "k": k}


def fused(env: Env) -> Outputs:
    """q and k as they come out of a fused projection: strided, side by side."""
    spec = SPECS["neox"][0]
    op = env.op("rope.apply", spec=spec, dims={"D": spec.head_dim})
    qkv = env.normal(5, 12, spec.head_dim)
    table = env.place(rope_table(spec, LENGTH))
    q, k = op(qkv[:, :8], qkv[:, 8:10], env.integers(0, LENGTH, 5), table, spec)
    return {"q": q, "k": k}


YARN = {"kind": "yarn", "factor": 4.0, "original_max_position": 512, "attention_factor": 1.14}
SPECS: dict[str, tuple[RopeSpec, Profile]] = {
    "neox": (RopeSpec(head_dim=128, rotary_dim=128), "core"),
    "neox, 64": (RopeSpec(head_dim=64, rotary_dim=64, theta=1e6), "core"),
    "neox, 80": (RopeSpec(head_dim=80, rotary_dim=80), "core"),
    "neox, 96": (RopeSpec(head_dim=96, rotary_dim=96), "core"),
    "neox, 256": (RopeSpec(head_dim=256, rotary_dim=256), "core"),
    "partial, 192": (RopeSpec(head_dim=192, rotary_dim=64), "core"),
    "interleaved": (RopeSpec(head_dim=64, rotary_dim=64, style="interleaved"), "core"),
    "partial": (RopeSpec(head_dim=128, rotary_dim=64), "core"),
    "interleaved, partial": (RopeSpec(head_dim=128, rotary_dim=64, style="interleaved"), "core"),
    "scaled": (RopeSpec(head_dim=64, rotary_dim=64, **YARN), "core"),  # type: ignore[arg-type]
    "odd": (RopeSpec(head_dim=20, rotary_dim=6), "odd_sizes"),
}
for name, (spec, profile) in SPECS.items():
    add(Case(op="rope.apply", name=name, run=lambda env, s=spec: rotate(env, s, 11), profile=profile))
for heads, kv_heads in ((4, 4), (16, 1)):
    name = f"{heads} to {kv_heads} heads"
    add(
        Case(
            op="rope.apply",
            name=name,
            run=lambda env, h=heads, k=kv_heads: rotate(env, SPECS["neox, 64"][0], 11, heads=h, kv_heads=k),
        )
    )
add(Case(op="rope.apply", name="sliced from a fused projection", run=fused))
add(Case(op="rope.apply", name="ends of a long table", run=ends))
add_rows(
    "rope.apply",
    rope_rows,
    odd=lambda env, rows: rope_rows(env, rows, SPECS["odd"][0], 3, 1),
    many=lambda env, rows: rope_rows(env, rows, RopeSpec(head_dim=16, rotary_dim=16), 2, 1),
    poisoned=("q", "k"),
)
