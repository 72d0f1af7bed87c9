"""Calls of attention, as `op_calls`: over a pool, decode steps of many reqs and prompts of one; without one, prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.selection import BoundOp
from sglang_core.bench.op_calls import EPS, TWICE, OpCall, Operands, Step, dtype_of
from sglang_core.ops import OPS
from sglang_core.ops.attention_plan import AttnBatch, AttnSpec, RaggedBatch
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.rope import rope_table
from sglang_core.ops.rope_paged import HeadNorms
from sglang_core.types import FULL, window_group

MOST_DECODING, LEAST_EXTEND = 256, 16  # a decode step of more reqs, and a prompt of fewer tokens, are rare
FILLED = 4096  # slots written at a time
Reqs = Sequence[tuple[int, int]]  # (prefix, extend) each


def paged_steps(tokens: int, context: int) -> Iterator[Step]:
    """What steps of so many tokens are."""
    if tokens <= MOST_DECODING:
        yield Step(tokens, f"decode of {tokens}, context {context}", ((context - 1, 1),) * tokens)
    yield from prompt_steps(tokens, context)


def prompt_steps(tokens: int, context: int) -> Iterator[Step]:
    if tokens >= LEAST_EXTEND:
        yield Step(tokens, f"prompt of {tokens}", ((0, tokens),))


def absorbed_steps(tokens: int, context: int) -> Iterator[Step]:
    """Steps that a layer with latents attends over as they are: of a longer prompt it expands them (`mla.is_expanded`)."""
    return paged_steps(tokens, context) if tokens <= MOST_DECODING else iter(())


def paged(make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """All keys are in the pool already: a call changes nothing."""
    spec, dtype = bound.site.spec, dtype_of(bound)
    sets = [(make.normal(step.tokens, spec.num_heads, spec.head_dim, dtype=dtype), None, None) for _ in range(TWICE)]
    return _over_pool(make, bound, step, _pool_spec(make, bound), sets, sinks=_sinks(make, spec))


def rope_paged(make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """All that is between the projections of a layer. It writes the new keys and values of each set where those of the other were."""
    spec, dtype, rotary = bound.site.spec, dtype_of(bound), _rotary(bound.site)
    longest = max(prefix + extend for prefix, extend in step.reqs)
    table = make.place(rope_table(rotary, longest))
    positions = torch.cat([torch.arange(p, p + e, dtype=torch.int32) for p, e in step.reqs])
    norms = None
    if bound.site.part("norm.rms") is not None:
        q_norm, k_norm = (1 + make.normal(spec.head_dim, dtype=dtype, scale=0.1) for _ in range(2))
        norms = HeadNorms(q_norm, k_norm, EPS)
    where = make.place(positions), table, rotary
    sets = [(*_qkv(make, spec, step.tokens, dtype), *where) for _ in range(TWICE)]
    more = {"head_norms": norms, "sinks": _sinks(make, spec)}
    return _over_pool(make, bound, step, _pool_spec(make, bound), sets, **more)


def latent(make: Operands, bound: BoundOp, step: Step, *, written: bool = False) -> OpCall:
    """`written`: the new latents are written first, as a layer has it; else they are in the pool already."""
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

    def operands(dim: int) -> tuple[Tensor, Tensor | None]:
        new = make.normal(step.tokens, dim, dtype=dtype) if written else None
        return make.normal(step.tokens, spec.num_heads, dim, dtype=dtype), new

    sets = []
    for _ in range(TWICE):
        (q_nope, c_kv), (q_pe, k_pe) = operands(spec.rank), operands(spec.rope_dim)
        sets.append((q_nope, q_pe, c_kv, k_pe))
    return _over_pool(make, bound, step, shape, sets)


def ragged(make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """Queries of prompts over their own keys, with what merging them with others needs."""
    spec, dtype = bound.site.spec, dtype_of(bound)
    assert isinstance(spec, AttnSpec)
    lens = [extend for _, extend in step.reqs]
    batch = RaggedBatch.of(lens, lens, make.runtime.torch_device)
    sets = [_qkv(make, spec, step.tokens, dtype) for _ in range(TWICE)]
    body = OPS["attn.ragged"].body
    return OpCall(
        title=f"{step.title}, {'' if spec.causal else 'not '}causal",
        bound=bound,
        kernel=tuple(partial(bound.fn, *qkv, batch, spec, lse=True) for qkv in sets),
        body=tuple(partial(body, *qkv, batch, spec, lse=True) for qkv in sets),
    )


def _qkv(make: Operands, spec: AttnSpec, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[T, Hq, D], [T, Hk, D], [T, Hk, Dv]."""
    q = make.normal(tokens, spec.num_heads, spec.head_dim, dtype=dtype)
    k, v = (make.normal(tokens, spec.num_kv_heads, dim, dtype=dtype) for dim in (spec.head_dim, spec.v_head_dim))
    return q, k, v


def _pool_spec(make: Operands, bound: BoundOp) -> PoolSpec:
    spec = bound.site.spec
    assert isinstance(spec, AttnSpec)
    group = FULL if spec.window is None else window_group(spec.window)
    return PoolSpec(
        num_layers=1,
        page_size=make.table.page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        dtype=KV_DTYPES.get(spec.kv_dtype, dtype_of(bound)),
        layout=make.table.pool_layout(group),
    )


def _rotary(site: OpSite) -> Any:
    part = site.part("rope.apply")
    assert part is not None, f"{site.op} in {site.layer} rotates nothing"
    return part.spec


def _sinks(make: Operands, spec: AttnSpec) -> Tensor | None:
    return make.normal(spec.num_heads, dtype=torch.float32) if spec.has_sinks else None


def _over_pool(
    make: Operands, bound: BoundOp, step: Step, shape: PoolSpec, sets: Sequence[tuple[Any, ...]], **more: Any
) -> OpCall:
    """A call that can be made again: its result is of its operands and of a pool that holds the rest."""
    device, spec = make.runtime.torch_device, bound.site.spec
    site = bound.site.part("attn.paged") or bound.site
    plan_op = "attn.plan" if shape.kind == "full" else "attn.mla_plan"
    own = next(b for b in make.table.bound_ops if b.site == replace(site, op=plan_op))
    batch = batch_of(step.reqs, shape.page_size, make.generator)
    pool = make.runtime.alloc_pool(shape, batch.num_reqs * batch.num_pages + 1)
    fill(make, pool)
    window = getattr(spec, "window", None)

    def calls(fn: Callable[..., Any], plan: Any) -> tuple[Callable[[], Any], ...]:
        return tuple(partial(fn, *operands, pool, 0, spec, plan, **more) for operands in sets)

    return OpCall(
        title=step.title if window is None else f"{step.title}, window {window}",
        bound=bound,
        kernel=calls(bound.fn, own.fn(spec, batch, device)),
        body=calls(OPS[bound.site.op].body, OPS[plan_op].body(spec, batch, device)),
    )


def batch_of(reqs: Reqs, page_size: int, generator: torch.Generator) -> AttnBatch:
    """Pages in random order; page 0 is nobody's."""
    prefixes, extends = torch.tensor(reqs, dtype=torch.int32).T.contiguous()
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
