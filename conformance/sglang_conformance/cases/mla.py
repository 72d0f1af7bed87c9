"""Latent attention over a pool that is full of NaN but for the latents that live in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.cases.attention import CHUNK, DECODE, LAYER, MIXED, NUM_LAYERS, PREFILL, TREES, Reqs, make_step
from sglang_conformance.env import Env
from sglang_core.ops.attention import AttnSpec
from sglang_core.ops.mla import MLASpec

COVERS = ("attn.mla_plan", "kv.write_mla")


def spec_of(heads: int = 8, rank: int = 64, rope: int = 32, scale: float = 0.15, **more: Any) -> MLASpec:
    return MLASpec(num_heads=heads, rank=rank, nope_dim=32, rope_dim=rope, v_head_dim=32, scale=scale, **more)


def stored(spec: MLASpec) -> AttnSpec:
    """What a pool of latents looks like: keys of `rank` dims and values of `rope_dim`, of one head."""
    like = AttnSpec(num_heads=1, num_kv_heads=1, head_dim=spec.rank, v_head_dim=spec.rope_dim, scale=1.0)
    return replace(like, kv_dtype=spec.kv_dtype, tree=spec.tree)


def latent(
    env: Env, reqs: Reqs, spec: MLASpec | None = None, page_size: int = 16, *, padding: int = 0, written: bool = False
) -> Outputs:
    """`written`: the latents of this step are in the pool already."""
    spec = spec or spec_of()
    ops = env.paged_ops(spec, page_size)
    step = make_step(env, stored(spec), reqs, page_size, padding=padding, kind="mla")
    plan = ops["attn.mla_plan"](spec, step.batch, env.device)
    tokens = step.batch.num_tokens
    q_nope, q_pe = env.normal(tokens, spec.num_heads, spec.rank), env.normal(tokens, spec.num_heads, spec.rope_dim)
    c_kv, k_pe = env.normal(tokens, spec.rank), env.normal(tokens, spec.rope_dim)
    if written:
        ops["kv.write_mla"](c_kv, k_pe, step.pool, LAYER, env.place(step.batch.slot_mapping_cpu))
    new = (None, None) if written else (c_kv, k_pe)
    first, again = (ops["attn.mla_paged"](q_nope, q_pe, *new, step.pool, LAYER, spec, plan) for _ in range(2))
    o, lse = ops["attn.mla_paged"](q_nope, q_pe, *new, step.pool, LAYER, spec, plan, lse=True)
    assert torch.equal(first.nan_to_num(), again.nan_to_num()), "a step run twice must give the same bits"
    kept = env.place(step.batch.slot_mapping_cpu[: tokens - padding])
    pool_c, pool_pe = step.pool.gather(LAYER, kept)
    return {"o": first, "o, with lse": o, "lse": lse, "pool_c": pool_c, "pool_pe": pool_pe}


def write(env: Env) -> Outputs:
    """Every slot that is written, and none of its neighbours."""
    spec = spec_of()
    ops = env.paged_ops(spec, 16)
    step = make_step(env, stored(spec), [(20, 30), (0, 7)], 16, kind="mla")
    c_kv, k_pe = env.normal(37, spec.rank), env.normal(37, spec.rope_dim)
    ops["kv.write_mla"](c_kv, k_pe, step.pool, LAYER, env.place(step.batch.slot_mapping_cpu))
    every = env.place(torch.arange(step.pool.num_pages * 16, dtype=torch.int32))
    outputs = {}
    for layer in range(NUM_LAYERS):
        outputs[f"c{layer}"], outputs[f"pe{layer}"] = step.pool.gather(layer, every)
    return outputs


def project(env: Env) -> Outputs:
    """Queries into latent space, and results out of it: the weight is a view there."""
    dims = {"Hq": 8, "D": 96}
    op = env.op("attn.mla_project", spec=spec_of(), dims=dims)
    into, out = env.normal(8, 32, 64, scale=0.2), env.normal(8, 32, 64, scale=0.2).transpose(1, 2)
    return {"into": op(env.normal(5, 8, 32), into), "out of": op(env.normal(5, 8, 64), out)}


def add_latent(name: str, reqs: Reqs, spec: MLASpec | None = None, *, profile: Profile = "core", **more: int) -> None:
    add(
        Case(
            op="attn.mla_paged",
            name=name,
            run=lambda env: latent(env, reqs, spec, **more),  # type: ignore[arg-type]
            profile=profile,
            exact=("pool_c", "pool_pe"),
            covers=COVERS,
        )
    )


add_latent("decode", DECODE)
add_latent("prefill", PREFILL)
add_latent("chunked prefill", CHUNK)
add_latent("mixed", MIXED)
add_latent("already written", MIXED, written=True)
add_latent("one req of one token", [(0, 1)])
add_latent("rank 512, 16 heads", [(200, 1), (0, 9)], spec_of(16, 512, 64, 0.05))
# Scores of some hundreds: their exponentials overflow float32.
add_latent("large scores", MIXED, spec_of(scale=20.0))
add_latent("page of 64", MIXED, page_size=64)
add_latent("page of 1", MIXED, profile="odd_sizes", page_size=1)
add_latent("odd sizes", MIXED, spec_of(3, 24, 8), profile="odd_sizes")
add_latent("tree", TREES, spec_of(tree=True), profile="tree")
add_latent("fp8_e4m3 latents", MIXED, spec_of(kv_dtype="fp8_e4m3"), profile="kv_fp8")
add_latent("int8 latents", MIXED, spec_of(kv_dtype="int8"), profile="kv_int8")
add_latent("padded decode", DECODE, padding=3, profile="buckets")
add_latent("padded mixed", MIXED, padding=5, profile="buckets")
add(Case(op="kv.write_mla", name="slots", run=write, exact=("c0", "pe0", "c1", "pe1")))
add(Case(op="attn.mla_project", name="into and out of latent space", run=project))
