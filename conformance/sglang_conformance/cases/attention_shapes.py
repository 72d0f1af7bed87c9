"""Attention over the sizes that models have, and over places in memory that 32 bits do not reach."""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang_conformance.case import FLOATS, Case, Outputs, add
from sglang_conformance.cases.attention import LAYER, MIXED, add_paged, make_step, new_kv, spec_of
from sglang_conformance.env import Env
from sglang_core.backend.pool import PoolSpec
from sglang_core.ops.attention import AttnBatch

HEAD_DIMS = (80, 96, 128, 192, 256)
GROUPS = {"2 to 2": (2, 2), "6 to 2": (6, 2), "16 to 1": (16, 1), "14 to 2": (14, 2), "40 to 8": (40, 8)}

for dim in HEAD_DIMS:
    add_paged(f"mixed, head dim {dim}", MIXED, spec_of(4, 2, dim))
    add_paged(f"decode, head dim {dim}", [(40, 1), (0, 1), (130, 1)], spec_of(4, 2, dim), full=True)
for name, (heads, kv_heads) in GROUPS.items():
    add_paged(f"{name} heads", MIXED, spec_of(heads, kv_heads), full=heads > 8)
add_paged("empty extends", [(5, 0), (30, 1), (0, 4), (64, 0)])
add_paged("page of 32", MIXED, page_size=32)
add_paged("page of 128", MIXED, page_size=128, full=True)
add_paged("a full page", [(15, 1), (16, 16), (0, 16), (48, 16)])


def strided(env: Env) -> Outputs:
    """Queries, keys and values as they come out of one fused projection: side by side, not contiguous."""
    spec = spec_of()
    ops = env.paged_ops(spec, 16)
    step = make_step(env, spec, MIXED, 16)
    plan = ops["attn.plan"](spec, step.batch, env.device)
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    qkv = env.normal(step.batch.num_tokens, heads + 2 * kv_heads, spec.head_dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    o, lse = ops["attn.paged"](q, k, v, step.pool, LAYER, spec, plan, lse=True)
    return {"o": o, "lse": lse}


def far(env: Env) -> Outputs:
    """One req at the end of a pool of 2^31 elements and more: slot * heads * dim does not fit 32 bits.

    The oracle and the body look at the same numbers in a small pool. Most of the large one is never touched.
    """
    spec, page_size, prefix = spec_of(8, 8, 128), 16, 40
    ops = env.paged_ops(spec, page_size)
    pages = env.far_pages(2**31 // (page_size * spec.num_kv_heads * spec.head_dim))
    pool = env.pool(_pool_spec(env, page_size), pages + 8, poisoned=False)
    own = pages + torch.tensor([5, 1, 4], dtype=torch.int32)
    slots = (own[:, None] * page_size + torch.arange(page_size, dtype=torch.int32)).flatten()[: prefix + 2]
    pool.poison(range(pages, pages + 8))
    pool.poison(range(8))  # where an index that wrapped around leads to
    pool.scatter(0, env.place(slots[:prefix]), *new_kv(env, spec, prefix))
    batch = AttnBatch(
        cu_extend_cpu=torch.tensor([0, 2], dtype=torch.int32),
        prefix_lens_cpu=torch.tensor([prefix], dtype=torch.int32),
        seq_lens_cpu=torch.tensor([prefix + 2], dtype=torch.int32),
        page_table_cpu=own[None],
        slot_mapping_cpu=slots[prefix:],
        num_tokens=2,
        num_reqs=1,
        max_extend=2,
        num_pages=3,
        page_size=page_size,
        static=False,
    )
    plan = ops["attn.plan"](spec, batch, env.device)
    q = env.normal(2, spec.num_heads, spec.head_dim)
    o = ops["attn.paged"](q, *new_kv(env, spec, 2), pool, 0, spec, plan)
    k, v = pool.gather(0, env.place(slots))
    return {"o": o, "pool_k": k, "pool_v": v}


def _pool_spec(env: Env, page_size: int) -> PoolSpec:
    return PoolSpec(num_layers=1, page_size=page_size, num_kv_heads=8, head_dim=128, v_head_dim=128, dtype=env.dtype)


COVERS = ("attn.plan", "kv.write")
add(Case(op="attn.paged", name="strided", run=strided, covers=COVERS))
add(
    Case(
        op="attn.paged",
        name="slots past 2^31 elements",
        run=far,
        dtypes=tuple(d for d in FLOATS if d.itemsize == 2),
        exact=("pool_k", "pool_v"),
        covers=COVERS,
        full=True,
    )
)
# Sums over long contexts: a running maximum that is lost, or weights kept in a half type, show here.
for length in (8191, 20_000):
    add(
        Case(
            op="attn.paged",
            name=f"a context of {length}",
            run=lambda env, n=length: long_context(env, n),
            covers=COVERS,
            full=True,
        )
    )


def long_context(env: Env, length: int) -> Outputs:
    spec = replace(spec_of(4, 2), scale=0.2)
    ops = env.paged_ops(spec, 64)
    step = make_step(env, spec, [(length, 1), (length // 2, 3)], 64)
    plan = ops["attn.plan"](spec, step.batch, env.device)
    q = env.normal(4, spec.num_heads, spec.head_dim)
    o, lse = ops["attn.paged"](q, *new_kv(env, spec, 4), step.pool, LAYER, spec, plan, lse=True)
    return {"o": o, "lse": lse}
