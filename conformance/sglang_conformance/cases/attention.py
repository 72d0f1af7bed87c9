"""Attention over a pool that is full of NaN but for the tokens that live in it, with pages in random order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.env import Env
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.ops.attention import AttnBatch, AttnSpec
from sglang_core.ops.tree_mask import tree_mask_of

LAYER, NUM_LAYERS = 1, 2
Reqs = list[tuple[int, int]]  # (prefix, extend) each


def spec_of(heads: int = 8, kv_heads: int = 2, dim: int = 64, **more: Any) -> AttnSpec:
    facts = {"scale": 1.5 * dim**-0.5, "v_head_dim": dim} | more  # peakier than usual: mistakes show more
    return AttnSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, **facts)


@dataclass(kw_only=True)
class Step:
    """A batch in host integers, and the pool with every prefix written."""

    batch: AttnBatch
    pool: Pool
    slots: list[Tensor]  # of each req's every token


def make_step(
    env: Env, spec: AttnSpec, reqs: Reqs, page_size: int, *, padding: int = 0, kind: Literal["full", "mla"] = "full"
) -> Step:
    """`padding` more reqs and tokens than there are, as in a bucket. With `spec.tree` a req's new tokens are a binary tree."""
    lens = [prefix + extend for prefix, extend in reqs]
    counts = [-(-n // page_size) for n in lens]
    pool_spec = PoolSpec(
        kind=kind,
        num_layers=NUM_LAYERS,
        page_size=page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        dtype=KV_DTYPES.get(spec.kv_dtype, env.dtype),
    )
    pool = env.pool(pool_spec, sum(counts) + 1)
    if pool_spec.scaling == "static":
        k_scale, v_scale = (env.integers(8, 100, spec.num_kv_heads).float() / 4096 for _ in range(2))
        pool.set_scales(LAYER, k_scale, v_scale)
    table = torch.zeros(len(reqs) + padding, max(counts) + padding, dtype=torch.int32)
    slots = []
    for r, pages in enumerate((env.permutation(sum(counts)) + 1).split(counts)):
        table[r, : len(pages)] = pages
        slots.append((pages[:, None] * page_size + torch.arange(page_size, dtype=torch.int32)).flatten()[: lens[r]])
    for r, ((prefix, _), own) in enumerate(zip(reqs, slots, strict=True)):
        k, v = new_kv(env, spec, prefix)
        pool.scatter(LAYER, env.place(own[:prefix]), k, v)
        if spec.window is not None:  # the core has let go of pages before it: the table names scratch there
            table[r, : max(0, prefix - spec.window) // page_size] = 0
    extends = torch.tensor([0] + [extend for _, extend in reqs] + [0] * padding)
    total = int(extends.sum())
    new_slots = [own[prefix:] for (prefix, _), own in zip(reqs, slots, strict=True)]
    none = torch.zeros(padding, dtype=torch.int32)
    batch = AttnBatch(
        cu_extend_cpu=extends.cumsum(0).to(torch.int32),
        prefix_lens_cpu=torch.tensor([p for p, _ in reqs] + [0] * padding, dtype=torch.int32),
        seq_lens_cpu=torch.tensor(lens + [0] * padding, dtype=torch.int32),
        page_table_cpu=table,
        slot_mapping_cpu=torch.cat([*new_slots, none]),
        num_tokens=total + padding,
        num_reqs=len(reqs) + padding,
        max_extend=int(extends.max()),
        num_pages=table.shape[1],
        page_size=page_size,
        static=padding > 0,
        tree_mask_cpu=_binary_trees(extends[1:].tolist(), padding) if spec.tree else None,
    )
    return Step(batch=batch, pool=pool, slots=slots)


def _binary_trees(sizes: list[int], padding: int) -> Tensor:
    """int32[T, W]; the children of token i are 2i + 1 and 2i + 2."""
    mask = tree_mask_of([[(i - 1) // 2 if i else -1 for i in range(size)] for size in sizes])
    return torch.cat([mask, mask.new_zeros(padding, mask.shape[1])])


def new_kv(env: Env, spec: AttnSpec, tokens: int) -> tuple[Tensor, Tensor]:
    return env.normal(tokens, spec.num_kv_heads, spec.head_dim), env.normal(tokens, spec.num_kv_heads, spec.v_head_dim)


def paged(
    env: Env, reqs: Reqs, spec: AttnSpec | None = None, page_size: int = 16, *, padding: int = 0, written: bool = False
) -> Outputs:
    """`written`: the keys of this step are in the pool already."""
    spec = spec or spec_of()
    ops = env.paged_ops(spec, page_size)
    step = make_step(env, spec, reqs, page_size, padding=padding)
    plan = ops["attn.plan"](spec, step.batch, env.device)
    tokens = step.batch.num_tokens
    q = env.normal(tokens, spec.num_heads, spec.head_dim)
    k, v = new_kv(env, spec, tokens)
    sinks = {"sinks": env.normal(spec.num_heads)} if spec.has_sinks else {}
    if written:
        ops["kv.write"](k, v, step.pool, LAYER, env.place(step.batch.slot_mapping_cpu))
    new = (None, None) if written else (k, v)
    first, again = (ops["attn.paged"](q, *new, step.pool, LAYER, spec, plan, **sinks) for _ in range(2))
    o, lse = ops["attn.paged"](q, *new, step.pool, LAYER, spec, plan, lse=True, **sinks)
    assert torch.equal(first.nan_to_num(), again.nan_to_num()), "a step run twice must give the same bits"
    kept = env.place(step.batch.slot_mapping_cpu[: tokens - padding])
    pool_k, pool_v = step.pool.gather(LAYER, kept)
    return {"o": first, "o, with lse": o, "lse": lse, "pool_k": pool_k, "pool_v": pool_v}


def cross(env: Env, lens: Reqs, kv_dtype: str = "auto") -> Outputs:
    """lens: (keys of an encoder, queries) each."""
    spec = spec_of(causal=False, cross=True, kv_dtype=kv_dtype)
    ops = env.paged_ops(spec, 16)
    step = make_step(env, spec, [(keys, 0) for keys, _ in lens], 16)
    queries = torch.tensor([0] + [n for _, n in lens])
    total = int(queries.sum())
    batch = replace(
        step.batch,
        cu_extend_cpu=queries.cumsum(0).to(torch.int32),
        slot_mapping_cpu=torch.zeros(total, dtype=torch.int32),
        num_tokens=total,
        max_extend=int(queries.max()),
    )
    plan = ops["attn.plan"](spec, batch, env.device)
    q = env.normal(total, spec.num_heads, spec.head_dim)
    o, lse = ops["attn.paged"](q, None, None, step.pool, LAYER, spec, plan, lse=True)
    scratch = torch.arange(16, dtype=torch.int32)
    return {"o": o, "lse": lse, "scratch": step.pool.gather(LAYER, env.place(scratch))[0]}


def write(env: Env) -> Outputs:
    """Every slot that is written, and none of its neighbours."""
    spec = spec_of()
    ops = env.paged_ops(spec, 16)
    step = make_step(env, spec, [(20, 30), (0, 7)], 16)
    k, v = new_kv(env, spec, 37)
    ops["kv.write"](k, v, step.pool, LAYER, env.place(step.batch.slot_mapping_cpu))
    every = torch.arange(step.pool.num_pages * 16, dtype=torch.int32)
    outputs = {}
    for layer in range(NUM_LAYERS):
        outputs[f"k{layer}"], outputs[f"v{layer}"] = step.pool.gather(layer, env.place(every))
    return outputs


DECODE: Reqs = [(99, 1), (0, 1), (15, 1), (16, 1), (700, 1)]
PREFILL: Reqs = [(0, 40), (0, 1), (0, 150)]
CHUNK: Reqs = [(256, 64), (30, 100)]
MIXED: Reqs = [(63, 1), (0, 70), (300, 1), (90, 33), (5, 2)]
TREES: Reqs = [(63, 7), (0, 40), (300, 1), (90, 33), (5, 2)]
CROSS: Reqs = [(50, 1), (1, 20), (0, 2), (300, 130)]
CAPPED = {"soft_cap": 2.0, "has_sinks": True}


def add_paged(
    name: str, reqs: Reqs, spec: AttnSpec | None = None, *, profile: Profile = "core", full: bool = False, **more: Any
) -> None:
    add(
        Case(
            op="attn.paged",
            name=name,
            run=lambda env: paged(env, reqs, spec, **more),
            profile=profile,
            exact=("pool_k", "pool_v"),
            covers=("attn.plan", "kv.write"),
            full=full,
        )
    )


add_paged("decode", DECODE)
add_paged("prefill", PREFILL)
add_paged("chunked prefill", CHUNK)
add_paged("mixed", MIXED)
add_paged("already written", MIXED, written=True)
add_paged("one req of one token", [(0, 1)])
add_paged("long decode", [(3000, 1), (1, 1)])
add_paged("many reqs", [(7 * i, 1) for i in range(33)])
add_paged("head dim 128", MIXED, spec_of(4, 4, 128))
add_paged("one KV head", MIXED, spec_of(8, 1))
# Scores of some hundreds: their exponentials overflow float32.
add_paged("large scores", MIXED, spec_of(scale=20.0))
add_paged("not causal", CHUNK, spec_of(causal=False), profile="odd_sizes")
add_paged("page of 64", MIXED, page_size=64)
add_paged("page of 1", MIXED, profile="odd_sizes", page_size=1)
add_paged("odd head dims", MIXED, spec_of(6, 3, 24, v_head_dim=40), profile="odd_sizes")
for window in (1, 16, 50):
    add_paged(f"window {window}", MIXED, spec_of(window=window), profile="window")
add_paged("window, long decode", [(2000, 1), (17, 1)], spec_of(window=100), profile="window")
add_paged("soft cap", MIXED, spec_of(soft_cap=2.0), profile="soft_cap")
add_paged("soft cap and window", MIXED, spec_of(soft_cap=2.0, window=33), profile="soft_cap")
add_paged("sinks", MIXED, spec_of(has_sinks=True), profile="sinks")
add_paged("sinks and window", MIXED, spec_of(has_sinks=True, window=40), profile="sinks")
add_paged("tree", TREES, spec_of(tree=True), profile="tree")
add_paged("tree, window, soft cap and sinks", TREES, spec_of(tree=True, window=3, **CAPPED), profile="tree")
add_paged("padded tree", TREES, spec_of(tree=True, window=20), padding=3, profile="tree")
add_paged("bfloat16 keys", MIXED, spec_of(kv_dtype="bfloat16"), profile="kv_half")
add_paged("float16 keys", MIXED, spec_of(kv_dtype="float16"), profile="kv_half")
for name in ("fp8_e4m3", "int8"):
    profile: Profile = "kv_fp8" if name == "fp8_e4m3" else "kv_int8"
    add_paged(f"{name} keys", MIXED, spec_of(kv_dtype=name), profile=profile)
    add_paged(
        f"{name} keys, window and soft cap", MIXED, spec_of(kv_dtype=name, window=33, soft_cap=2.0), profile=profile
    )
    add_paged(f"{name} keys, padded decode", DECODE, spec_of(kv_dtype=name), padding=3, profile=profile)
add_paged("padded decode", DECODE, padding=3, profile="buckets")
add_paged("padded mixed", MIXED, padding=5, profile="buckets")
add(Case(op="attn.paged", name="cross", run=lambda env: cross(env, CROSS), profile="cross", exact=("scratch",)))
add(Case(op="kv.write", name="slots", run=write, exact=("k0", "v0", "k1", "v1")))


def ragged(env: Env, lens: Reqs, spec: AttnSpec) -> Outputs:
    """lens: (queries, keys) each."""
    dims = {"Hq": spec.num_heads, "Hk": spec.num_kv_heads, "D": spec.head_dim}
    op = env.op("attn.ragged", spec=spec, dims=dims)
    num_q, num_k = (sum(n) for n in zip(*lens, strict=True))
    cu_q, cu_k = (env.place(torch.tensor([0, *n]).cumsum(0).to(torch.int32)) for n in zip(*lens, strict=True))
    q = env.normal(num_q, spec.num_heads, spec.head_dim)
    k, v = new_kv(env, spec, num_k)
    max_q, max_k = (max(n) for n in zip(*lens, strict=True))
    o, lse = op(q, k, v, cu_q, cu_k, spec, max_q=max_q, max_k=max_k, lse=True)
    return {"o": o, "lse": lse}


SQUARE: Reqs = [(40, 40), (1, 1), (150, 150)]
add(Case(op="attn.ragged", name="encoder", run=lambda env: ragged(env, SQUARE, spec_of(causal=False))))
add(Case(op="attn.ragged", name="causal", run=lambda env: ragged(env, SQUARE, spec_of())))
add(Case(op="attn.ragged", name="more keys than queries", run=lambda env: ragged(env, [(5, 40), (64, 65)], spec_of())))
add(Case(op="attn.ragged", name="an empty req", run=lambda env: ragged(env, [(5, 5), (0, 0), (3, 3)], spec_of())))
add(Case(op="attn.ragged", name="window", run=lambda env: ragged(env, SQUARE, spec_of(window=9)), profile="window"))


def merge(env: Env) -> Outputs:
    """Rows 0..2 have an empty side, or two; an empty side's values are NaN."""
    shape = (12, 8, 64)
    o_a, o_b = env.normal(*shape), env.normal(*shape)
    lse_a, lse_b = (env.place(10 * env.normal(12, 8).float().cpu()) for _ in range(2))
    empty_a = env.place(torch.tensor([True, False, True] + [False] * 9))[:, None]
    empty_b = env.place(torch.tensor([False, True, True] + [False] * 9))[:, None]
    o, lse = env.op("attn.merge", dims={"Hq": 8, "D": 64})(
        torch.where(empty_a[..., None], torch.nan, o_a),
        torch.where(empty_a, -torch.inf, lse_a),
        torch.where(empty_b[..., None], torch.nan, o_b),
        torch.where(empty_b, -torch.inf, lse_b),
    )
    return {"o": o, "lse": lse}


add(Case(op="attn.merge", name="halves and empty sides", run=merge))
