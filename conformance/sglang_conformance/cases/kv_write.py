"""Writes to a pool, bit for bit: every slot that is written, in whatever the pool stores, and none of its neighbours."""

from __future__ import annotations

from sglang_conformance.case import HALVES, Case, Outputs, Profile, add
from sglang_conformance.cases.attention import FullLayer
from sglang_conformance.cases.attention import spec_of as full_spec
from sglang_conformance.cases.kv_step import STORED, Layer, Reqs
from sglang_conformance.cases.mla import LatentLayer
from sglang_conformance.cases.mla import spec_of as latent_spec
from sglang_conformance.env import Env

TWO: Reqs = [(20, 30), (0, 7)]
KV_DTYPES: dict[str, Profile] = {
    "bfloat16": "kv_half",
    "float16": "kv_half",
    "fp8_e4m3": "kv_fp8",
    "int8": "kv_int8",
}


def layer_of(env: Env, op: str, page_size: int = 16, kv_dtype: str = "auto", odd: bool = False) -> Layer:
    if op == "kv.write":
        spec = full_spec(6, 3, 24, v_head_dim=40, kv_dtype=kv_dtype) if odd else full_spec(kv_dtype=kv_dtype)
        return FullLayer(env, spec, page_size)
    return LatentLayer(
        env, latent_spec(3, 24, 8, kv_dtype=kv_dtype) if odd else latent_spec(kv_dtype=kv_dtype), page_size
    )


def extremes(env: Env, op: str, kv_dtype: str) -> Outputs:
    """A token of zeros, tokens of one large number among small ones, and tokens of tiny numbers."""
    layer = layer_of(env, op, kv_dtype=kv_dtype)
    step = layer.step(TWO)
    inputs = layer.inputs(37)
    for x in inputs[1:]:
        x[3] = 0.0
        x[5:9] *= 1e-4
        x[9:12, ..., :1] = 3e4
        x[12:14] = 1e-7  # below what half types hold as normal numbers
    layer.write(step, *inputs)
    slots = env.place(step.new_slots)
    k, v = step.pool.gather(step.layer, slots)
    return {"k": k, "v": v}


def far(env: Env, op: str, kv_dtype: str) -> Outputs:
    """Slots whose place does not fit 32 bits: what is there afterwards, and at the pool's beginning."""
    layer = layer_of(env, op, kv_dtype=kv_dtype)
    step = layer.step([(40, 2)], far=True)
    layer.write(step, *layer.inputs(2))
    k, v = step.pool.gather(step.layer, env.place(step.new_slots))
    return {"k": k, "v": v}


for op in ("kv.write", "kv.write_mla"):

    def add_write(
        name: str, reqs: Reqs = TWO, *, profile: Profile = "core", strides: int = 0, op: str = op, **of: object
    ) -> None:
        add(
            Case(
                op=op,
                name=name,
                profile=profile,
                exact=STORED,
                run=lambda env: layer_of(env, op, **of).writes(reqs, strides=strides),  # type: ignore[arg-type]
            )
        )

    add_write("slots")
    add_write("one token", [(16, 1)])
    add_write("no tokens", [(5, 0)])
    add_write("page of 1", profile="odd_sizes", page_size=1)
    add_write("page of 64", page_size=64)
    add_write("odd sizes", profile="odd_sizes", odd=True)
    add_write("sliced", strides=16)
    add_write("sliced at odd places", profile="odd_sizes", strides=3)
    for kv_dtype, profile in KV_DTYPES.items():
        add_write(f"{kv_dtype} pool", profile=profile, kv_dtype=kv_dtype)
    for kv_dtype, profile in ({"auto": "core"} | KV_DTYPES).items():
        add(
            Case(
                op=op,
                name=f"extremes, {kv_dtype} pool",
                profile=profile,
                exact=("k", "v"),
                run=lambda env, o=op, d=kv_dtype: extremes(env, o, d),
            )
        )
    for kv_dtype, profile in {"auto": "core", "fp8_e4m3": "kv_fp8", "int8": "kv_int8"}.items():
        add(
            Case(
                op=op,
                name=f"slots past 2^31 elements, {kv_dtype} pool",
                profile=profile,
                dtypes=HALVES,
                exact=("k", "v"),
                full=True,
                run=lambda env, o=op, d=kv_dtype: far(env, o, d),
            )
        )
