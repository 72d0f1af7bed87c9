"""Calls of attention over a pool, as `op_calls`: decode steps of many reqs, and prompts of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.selection import BoundOp
from sglang_core.bench.op_calls import TWICE, OpCall, Operands, dtype_of
from sglang_core.ops import OPS
from sglang_core.ops.attention_plan import AttnBatch, AttnSpec
from sglang_core.ops.mla import MLASpec
from sglang_core.types import FULL, window_group

MOST_DECODING, LEAST_EXTEND = 256, 16  # a decode step of more reqs, and a prompt of fewer tokens, are rare
FILLED = 4096  # slots written at a time
Reqs = Sequence[tuple[int, int]]  # (prefix, extend) each


def steps(tokens: int, context: int) -> Iterator[tuple[str, Reqs]]:
    """What steps of so many tokens are."""
    if tokens <= MOST_DECODING:
        yield f"decode of {tokens}, context {context}", [(context - 1, 1)] * tokens
    if tokens >= LEAST_EXTEND:
        yield f"prompt of {tokens}", [(0, tokens)]


def paged(make: Operands, bound: BoundOp, tokens: int) -> Iterator[OpCall]:
    spec, dtype = bound.site.spec, dtype_of(bound)
    assert isinstance(spec, AttnSpec)
    group = FULL if spec.window is None else window_group(spec.window)
    shape = PoolSpec(
        num_layers=1,
        page_size=make.table.page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        dtype=KV_DTYPES.get(spec.kv_dtype, dtype),
        layout=make.table.pool_layout(group),
    )
    more: dict[str, Any] = {}
    if spec.has_sinks:
        more["sinks"] = make.normal(spec.num_heads, dtype=torch.float32)

    def queries(count: int) -> tuple[Tensor, ...]:
        return (make.normal(count, spec.num_heads, spec.head_dim, dtype=dtype),)

    yield from _over_pool(make, bound, tokens, shape, "attn.plan", queries, more)


def latent(make: Operands, bound: BoundOp, tokens: int) -> Iterator[OpCall]:
    spec, dtype = bound.site.spec, dtype_of(bound)
    assert isinstance(spec, MLASpec)
    shape = PoolSpec(
        kind="mla",
        num_layers=1,
        page_size=make.table.page_size,
        num_kv_heads=1,
        head_dim=spec.rank,
        v_head_dim=spec.rope_dim,
        dtype=KV_DTYPES.get(spec.kv_dtype, dtype),
        layout=make.table.pool_layout(FULL),
    )

    def queries(count: int) -> tuple[Tensor, ...]:
        return tuple(make.normal(count, spec.num_heads, dim, dtype=dtype) for dim in (spec.rank, spec.rope_dim))

    yield from _over_pool(make, bound, tokens, shape, "attn.mla_plan", queries, {})


def _over_pool(
    make: Operands, bound: BoundOp, tokens: int, shape: PoolSpec, plan_op: str, queries: Any, more: dict[str, Any]
) -> Iterator[OpCall]:
    """All keys are in the pool already: a call changes nothing, and can be made again."""
    site, device = bound.site, make.runtime.torch_device
    own = next(b for b in make.table.bound_ops if b.site == replace(site, op=plan_op))
    for title, reqs in steps(tokens, make.context):
        batch = batch_of(reqs, shape.page_size, make.generator)
        pool = make.runtime.alloc_pool(shape, batch.num_reqs * batch.num_pages + 1)
        fill(make, pool)
        plan, reference = own.fn(site.spec, batch, device), OPS[plan_op].body(site.spec, batch, device)
        qs = [queries(batch.num_tokens) for _ in range(TWICE)]
        body = OPS[site.op].body
        yield OpCall(
            title=title,
            bound=bound,
            kernel=tuple(partial(bound.fn, *q, None, None, pool, 0, site.spec, plan, **more) for q in qs),
            body=tuple(partial(body, *q, None, None, pool, 0, site.spec, reference, **more) for q in qs),
        )


def batch_of(reqs: Reqs, page_size: int, generator: torch.Generator) -> AttnBatch:
    """Pages in random order; page 0 is nobody's."""
    prefixes, extends = torch.tensor(reqs, dtype=torch.int32).unbind(1)
    lens = prefixes + extends
    columns = -(-int(lens.max()) // page_size)
    table = torch.randperm(len(reqs) * columns, generator=generator).int().add(1).view(len(reqs), columns)
    slots = (table[..., None] * page_size + torch.arange(page_size, dtype=torch.int32)).flatten(1)
    new = [own[p : p + e] for own, (p, e) in zip(slots, reqs, strict=True)]
    return AttnBatch(
        cu_extend_cpu=torch.cat([torch.zeros(1, dtype=torch.int32), extends.cumsum(0).int()]),
        prefix_lens_cpu=prefixes,
        seq_lens_cpu=lens,
        page_table_cpu=table,
        slot_mapping_cpu=torch.cat(new),
        num_tokens=int(extends.sum()),
        num_reqs=len(reqs),
        max_extend=int(extends.max()),
        num_pages=columns,
        page_size=page_size,
    )


def fill(make: Operands, pool: Pool) -> None:
    """Numbers in every slot but those of page 0."""
    spec = pool.spec
    dtype = spec.dtype if spec.scaling == "none" else torch.float32
    first, last = spec.page_size, pool.num_pages * spec.page_size
    for start in range(first, last, FILLED):
        slots = torch.arange(start, min(start + FILLED, last), dtype=torch.int32)
        k, v = (
            make.normal(len(slots), spec.num_kv_heads, dim, dtype=dtype) for dim in (spec.head_dim, spec.v_head_dim)
        )
        pool.scatter(0, make.place(slots), k, v)
