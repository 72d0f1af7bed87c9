"""Attention over a pool of many layers, each call another one: what a step reads is not in a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from sglang_conformance.perf.load import CONTEXT, STEPS, PerfEnv, Work, add, copies_of, size_of
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.ops.attention import AttnBatch, AttnSpec, RaggedBatch
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.rope import RopeSpec, rope_table
from sglang_core.ops.rope_paged import HeadNorms

PAGE_SIZE, MOST_LAYERS = 16, 64
SPEC = AttnSpec(num_heads=16, num_kv_heads=8, head_dim=128, v_head_dim=128, scale=128**-0.5)
ROPE = RopeSpec(head_dim=128, rotary_dim=128)
LATENT = MLASpec(num_heads=16, rank=512, nope_dim=128, rope_dim=64, v_head_dim=128, scale=192**-0.5)
Reqs = list[tuple[int, int]]  # (prefix, extend) each


def reqs_of(tokens: int) -> Reqs:
    """A batch of decoding reqs, or one prompt."""
    return [(0, tokens)] if tokens > 32 else [(CONTEXT - 1, 1)] * tokens


def batch_of(env: PerfEnv, reqs: Reqs) -> AttnBatch:
    """Pages in random order; page 0 is nobody's."""
    lens = torch.tensor([prefix + extend for prefix, extend in reqs])
    columns = -(-int(lens.max()) // PAGE_SIZE)
    table = (env.permutation(len(reqs) * columns) + 1).view(len(reqs), columns)
    slots = (table[..., None] * PAGE_SIZE + torch.arange(PAGE_SIZE, dtype=torch.int32)).flatten(1)
    extends = torch.tensor([0] + [extend for _, extend in reqs])
    return AttnBatch(
        cu_extend_cpu=extends.cumsum(0).int(),
        prefix_lens_cpu=torch.tensor([prefix for prefix, _ in reqs], dtype=torch.int32),
        seq_lens_cpu=lens.int(),
        page_table_cpu=table,
        slot_mapping_cpu=torch.cat([own[p : p + e] for own, (p, e) in zip(slots, reqs, strict=True)]),
        num_tokens=int(extends.sum()),
        num_reqs=len(reqs),
        max_extend=int(extends.max()),
        num_pages=columns,
        page_size=PAGE_SIZE,
    )


def pool_of(env: PerfEnv, kind: str, heads: int, dims: tuple[int, int], pages: int) -> Pool:
    """Numbers in every slot of every layer."""
    spec = PoolSpec(
        kind="mla" if kind == "mla" else "full",
        num_layers=1,
        page_size=PAGE_SIZE,
        num_kv_heads=heads,
        head_dim=dims[0],
        v_head_dim=dims[1],
        dtype=env.dtype,
    )
    layers = min(MOST_LAYERS, copies_of(spec.bytes_per_page * pages))
    pool = env.pool(replace(spec, num_layers=layers), pages, poisoned=False)
    slots = env.place(torch.arange(pages * PAGE_SIZE, dtype=torch.int32))
    k, v = (env.normal(pages * PAGE_SIZE, heads, dim) for dim in dims)
    for layer in range(layers):
        pool.scatter(layer, slots, k, v)
    return pool


def pairs_of(reqs: Reqs) -> int:
    """Query and key pairs under a causal mask."""
    return sum(e * p + e * (e + 1) // 2 for p, e in reqs)


def paged(env: PerfEnv, tokens: int) -> Work:
    """Bytes: q, the new and the cached keys and values once, the result; the new ones are written, too."""
    reqs, spec = reqs_of(tokens), SPEC
    ops, batch = env.paged_ops(spec, PAGE_SIZE), batch_of(env, reqs)
    pool = pool_of(env, "full", spec.num_kv_heads, (128, 128), batch.num_reqs * batch.num_pages + 1)
    plan = ops["attn.plan"](spec, batch, env.device)
    q = env.normal(tokens, spec.num_heads, spec.head_dim)
    k, v = (env.normal(tokens, spec.num_kv_heads, spec.head_dim) for _ in range(2))
    cached = sum(p + e for p, e in reqs) * spec.num_kv_heads * 2 * spec.head_dim * q.element_size()
    return Work(
        calls=[partial(ops["attn.paged"], q, k, v, pool, layer, spec, plan) for layer in range(pool.spec.num_layers)],
        nbytes=cached + 2 * size_of(q) + size_of(k, v),
        flops=4 * pairs_of(reqs) * spec.num_heads * spec.head_dim,
    )


def rope_paged(env: PerfEnv, tokens: int) -> Work:
    """As attention alone: what is rotated on the way is read and written anyhow. With head norms."""
    reqs, spec = reqs_of(tokens), SPEC
    ops, batch = env.paged_ops(spec, PAGE_SIZE, ROPE, normed=True), batch_of(env, reqs)
    pool = pool_of(env, "full", spec.num_kv_heads, (128, 128), batch.num_reqs * batch.num_pages + 1)
    plan = ops["attn.plan"](spec, batch, env.device)
    q = env.normal(tokens, spec.num_heads, spec.head_dim)
    k, v = (env.normal(tokens, spec.num_kv_heads, spec.head_dim) for _ in range(2))
    at = env.integers(0, 1024, tokens), env.place(rope_table(ROPE, 1024)), ROPE
    norms = HeadNorms(env.normal(spec.head_dim), env.normal(spec.head_dim), 1e-6)
    cached = sum(p + e for p, e in reqs) * spec.num_kv_heads * 2 * spec.head_dim * q.element_size()
    whole = partial(ops["attn.rope_paged"], head_norms=norms)
    return Work(
        calls=[partial(whole, q, k, v, *at, pool, layer, spec, plan) for layer in range(pool.spec.num_layers)],
        nbytes=cached + 2 * size_of(q) + size_of(k, v),
        flops=4 * pairs_of(reqs) * spec.num_heads * spec.head_dim,
    )


def latent(env: PerfEnv, tokens: int) -> Work:
    """A score takes `rank + rope_dim` multiply-adds, a value `rank`."""
    reqs, spec = reqs_of(tokens), LATENT
    ops, batch = env.paged_ops(spec, PAGE_SIZE), batch_of(env, reqs)
    pool = pool_of(env, "mla", 1, (spec.rank, spec.rope_dim), batch.num_reqs * batch.num_pages + 1)
    plan = ops["attn.mla_plan"](spec, batch, env.device)
    q = env.normal(tokens, spec.num_heads, spec.rank), env.normal(tokens, spec.num_heads, spec.rope_dim)
    new = env.normal(tokens, spec.rank), env.normal(tokens, spec.rope_dim)
    cached = sum(p + e for p, e in reqs) * (spec.rank + spec.rope_dim) * q[0].element_size()
    return Work(
        calls=[
            partial(ops["attn.mla_paged"], *q, *new, pool, layer, spec, plan) for layer in range(pool.spec.num_layers)
        ],
        nbytes=cached + size_of(*q, *new) + size_of(q[0]),
        flops=2 * pairs_of(reqs) * spec.num_heads * (2 * spec.rank + spec.rope_dim),
    )


def write(env: PerfEnv, tokens: int, op: str) -> Work:
    """Reads and writes each new key and value."""
    mla = op == "kv.write_mla"
    ops = env.paged_ops(LATENT if mla else SPEC, PAGE_SIZE)
    heads, dims = (1, (LATENT.rank, LATENT.rope_dim)) if mla else (SPEC.num_kv_heads, (128, 128))
    pages = -(-tokens // PAGE_SIZE) + 1
    pool = pool_of(env, "mla" if mla else "full", heads, dims, pages)
    new = [env.normal(tokens, *(() if mla else (heads,)), dim) for dim in dims]
    slots = env.place(env.permutation(pages * PAGE_SIZE - PAGE_SIZE)[:tokens] + PAGE_SIZE)
    calls = [partial(ops[op], *new, pool, layer, slots) for layer in range(pool.spec.num_layers)]
    return Work(calls=calls, nbytes=2 * size_of(*new))


def ragged(env: PerfEnv, tokens: int) -> Work:
    """An encoder over one input: every query sees every key."""
    spec = AttnSpec(num_heads=16, num_kv_heads=16, head_dim=64, v_head_dim=64, scale=64**-0.5, causal=False)
    op = env.op("attn.ragged", spec=spec, dims={"Hq": 16, "Hk": 16, "D": 64})
    q, k, v = (env.normal(tokens, 16, 64) for _ in range(3))
    call = partial(op, q, k, v, RaggedBatch.of([tokens], [tokens], env.device), spec)
    return Work(calls=[call], nbytes=4 * size_of(q), flops=4 * tokens**2 * 16 * 64)


def merge(env: PerfEnv, tokens: int) -> Work:
    op = env.op("attn.merge", dims={"Hq": 16, "D": 128})
    o, lse = env.normal(tokens, 16, 128), env.place(torch.zeros(tokens, 16))
    nbytes = 3 * size_of(o, lse)
    pairs = zip(*(env.tensors(tokens, 16, 128, copies=copies_of(nbytes)) for _ in range(2)), strict=True)
    return Work(calls=[partial(op, a, lse, b, lse) for a, b in pairs], nbytes=nbytes)


def project(env: PerfEnv, tokens: int) -> Work:
    """Queries into latent space: a product a head."""
    spec = LATENT
    op = env.op("attn.mla_project", spec=spec, dims={"Hq": spec.num_heads, "D": spec.nope_dim + spec.rope_dim})
    x = env.normal(tokens, spec.num_heads, spec.nope_dim)
    stored = spec.num_heads * spec.nope_dim * spec.rank * x.element_size()
    weights = env.tensors(spec.num_heads, spec.nope_dim, spec.rank, copies=copies_of(stored))
    return Work(
        calls=[partial(op, x, w) for w in weights],
        nbytes=stored + size_of(x) + tokens * spec.num_heads * spec.rank * x.element_size(),
        flops=2 * tokens * spec.num_heads * spec.nope_dim * spec.rank,
    )


MAKERS: dict[str, Callable[..., Work]] = {
    "attn.paged": paged,
    "attn.rope_paged": rope_paged,
    "kv.write": partial(write, op="kv.write"),
    "attn.merge": merge,
    "attn.mla_paged": latent,
    "attn.mla_project": project,
    "kv.write_mla": partial(write, op="kv.write_mla"),
}
for name, make in MAKERS.items():
    for step, tokens in STEPS.items():
        add(name, step, partial(make, tokens=tokens))
add("attn.ragged", "encoder of 512", partial(ragged, tokens=512))
