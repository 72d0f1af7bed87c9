from __future__ import annotations

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.env import Env
from sglang_core.ops.rope import RopeSpec, rope_table

LENGTH = 2048


def rotate(env: Env, spec: RopeSpec, tokens: int) -> Outputs:
    op = env.op("rope.apply", spec=spec, dims={"D": spec.head_dim})
    q, k = env.normal(tokens, 8, spec.head_dim), env.normal(tokens, 2, spec.head_dim)
    table = env.place(rope_table(spec, LENGTH))
    q, k = op(q, k, env.integers(0, LENGTH, tokens), table, spec)
    return {"q": q, "k": k}


def slices(env: Env) -> Outputs:
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
    "interleaved": (RopeSpec(head_dim=64, rotary_dim=64, style="interleaved"), "core"),
    "partial": (RopeSpec(head_dim=128, rotary_dim=64), "core"),
    "scaled": (RopeSpec(head_dim=64, rotary_dim=64, **YARN), "core"),  # type: ignore[arg-type]
    "odd": (RopeSpec(head_dim=20, rotary_dim=6), "odd_sizes"),
}
for name, (spec, profile) in SPECS.items():
    add(Case(op="rope.apply", name=name, run=lambda env, s=spec: rotate(env, s, 11), profile=profile))
add(Case(op="rope.apply", name="no tokens", run=lambda env: rotate(env, SPECS["neox"][0], 0)))
add(Case(op="rope.apply", name="slices", run=slices))
