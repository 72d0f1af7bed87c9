"""Ragged paged attention as one Pallas kernel: decode, prefill, mixed steps and latents.

A grid step is an item of the plan: rows of a block of queries, and the pages of one req. Pages come from the pool by DMA, a block of
keys at a time into one of two buffers, while the kernel is at the other; the first block of the next item is under way
before an item ends. Scores never leave VMEM: softmax is online, in float32 (Milakov and Gimelshein 2018; Dao et al. 2022).

A pool's leaf has its heads in rows of the pages: [N, P, Hk, D], turned to [Hk, S, D] once it is in VMEM. With one head it is [N, P, D], which is
the same bytes. Nothing of the pool is copied in HBM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sglang_tpu.attention_plan import (
    BLOCK,
    END_KEY,
    END_PAGE,
    END_ROW,
    FIELDS,
    FIRST_PAGE,
    FIRST_ROW,
    POSITION,
    REQ,
)
from sglang_tpu.kv_write import Written, write_rows

KEYS = 256  # of a block, two of which are in VMEM
BUFFER = 2 << 20  # bytes of a block at most, unless a page has more
VMEM_LIMIT = 32 << 20  # the compiler's own is 16 MiB; every TPU from v5e on has 64 or more
LANES = 128
MASKED = -1e30  # a score that is not seen. Finite, so that a row of them has a maximum to subtract


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is compiled into a kernel."""

    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    has_sinks: bool
    latent: bool  # scores are of both leaves, values are the first; else keys are the first, and values the second
    values: int  # Dv: what of a leaf's rows is not filling
    block: int  # tokens
    lse: bool


def attend(
    facts: Facts,
    plan: tuple[jax.Array, jax.Array, jax.Array],
    queries: tuple[jax.Array, ...],
    leaves: tuple[jax.Array, jax.Array],
    new: Written | None,
    sinks: jax.Array | None,
    *,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """-> o: [B, Hk, rows, Dv], lse: float32[B, Hk, rows, 1] if asked for, then the leaves if anything is new.

    plan: items int32[I * FIELDS], count int32[1], page table int32[R, C]. queries: [B, Hk, rows, D] each, rows = block * group, of one
    token after the other; with latents one for each leaf. leaves: [N, P, Hk, D], or [N, P, D] of one head. new: this step's keys
    and values, which are written first. sinks: float32[Hk, rows, LANES]. What is of no item is not written to: B's rest is garbage.
    """
    num_blocks, heads, rows = queries[0].shape[:3]
    page_size = leaves[0].shape[1]
    page_bytes = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in leaves)
    pages = max(1, min(KEYS // page_size, BUFFER // page_bytes))
    values = leaves[0 if facts.latent else 1].shape[-1]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def of_block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, heads, rows, width), lambda i, items, *_: (items[i * len(FIELDS) + BLOCK], 0, 0, 0))

    def row_of(later: int) -> pl.BlockSpec:
        """The page table's row of an item, or of the next: the whole table would not fit SMEM."""

        def index(i: Any, items: Any, count: Any, *_: Any) -> tuple[Any, int, int]:
            return items[jnp.minimum(i + later, count[0] - 1) * len(FIELDS) + REQ], 0, 0

        return pl.BlockSpec((1, 1, table.shape[1]), index, memory_space=pltpu.SMEM)

    items, count, table = plan
    rows_of_table = table[:, None]
    scalars = [items, count, *(new.scalars if new else ())]
    inputs = [
        rows_of_table,
        rows_of_table,
        *queries,
        *((sinks,) if sinks is not None else ()),
        *(new.rows if new else ()),
        *leaves,
    ]
    in_specs = [row_of(0), row_of(1), *(of_block(q.shape[-1]) for q in queries)]
    in_specs += [pl.BlockSpec((heads, rows, LANES), lambda *_: (0, 0, 0))] * (sinks is not None)
    in_specs += [anywhere] * (len(inputs) - len(in_specs))
    out_shape = [jax.ShapeDtypeStruct((num_blocks, heads, rows, values), queries[0].dtype)]
    out_specs = [of_block(values)]
    if facts.lse:
        out_shape.append(jax.ShapeDtypeStruct((num_blocks, heads, rows, 1), jnp.float32))
        out_specs.append(of_block(1))
    aliases = {}
    if new:
        first = len(scalars) + len(inputs) - len(leaves)
        aliases = {first + n: len(out_shape) + n for n in range(len(leaves))}
        out_shape += [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        out_specs += [anywhere] * len(leaves)
    accumulators = [
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, values), jnp.float32),
    ]
    buffers = [pltpu.VMEM((2, pages, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    return pl.pallas_call(
        partial(_kernel, facts, len(queries), new is not None),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(count[0],),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                *accumulators,
                *buffers,
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="mla_paged" if facts.latent else "paged",
    )(*scalars, *inputs)


def _kernel(facts: Facts, num_queries: int, writes: bool, *refs: Any) -> None:
    given = iter(refs)

    def take(count: int) -> tuple[Any, ...]:
        return tuple(next(given) for _ in range(count))

    items, count = take(2)
    slots = take(2 if writes else 0)
    table, next_table = take(2)
    queries = take(num_queries)
    sinks = take(1 if facts.has_sinks else 0)
    new = take(2 if writes else 0)
    leaves = take(2)
    o = take(1)[0]
    lse = take(1 if facts.lse else 0)
    if writes:
        leaves = take(2)
    top, total, acc, *buffers, turn, sems, write_sem = take(8)

    i = pl.program_id(0)
    pages = _Pages(items, leaves, buffers, sems)
    item = partial(_field, items, i)
    later = i + 1 < count[0]

    @pl.when(i == 0)
    def _() -> None:
        if writes:
            write_rows(slots, new, leaves, write_sem)
        turn[0] = 0
        pages.start(table, 0, 0, 0)

    @pl.when((i == 0) | (_field(items, jnp.maximum(i - 1, 0), BLOCK) != item(BLOCK)))
    def _() -> None:
        top[...] = sinks[0][...] if sinks else jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.full(total.shape, 1.0 if sinks else 0.0, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    num = pl.cdiv(item(END_PAGE) - item(FIRST_PAGE), pages.per_block)

    def visit(j: jax.Array, _: None) -> None:
        now = turn[0]
        more = j + 1 < num

        @pl.when(more)
        def _() -> None:
            pages.start(table, i, j + 1, 1 - now)

        @pl.when(jnp.logical_not(more) & later)
        def _() -> None:
            pages.start(next_table, i + 1, 0, 1 - now)

        pages.wait(i, j, now)
        _attend_block(facts, item, pages.first_key(i, j), queries, [b.at[now] for b in buffers], top, total, acc)
        turn[0] = 1 - now

    lax.fori_loop(0, num, visit, None)

    @pl.when(jnp.logical_not(later) | (_field(items, jnp.where(later, i + 1, i), BLOCK) != item(BLOCK)))
    def _() -> None:
        for h in range(acc.shape[0]):
            sums = total[h][:, :1]
            some = sums > 0
            o[0, h] = (acc[h] / jnp.where(some, sums, 1.0)).astype(o.dtype)
            if lse:
                lse[0][0, h] = jnp.where(some, top[h][:, :1] + jnp.log(jnp.where(some, sums, 1.0)), -jnp.inf)


def _field(items: Any, i: Any, field: int) -> jax.Array:
    found: jax.Array = items[i * len(FIELDS) + field]
    return found


class _Pages:
    """Blocks of pages, from the pool into one of two buffers."""

    def __init__(self, items: Any, leaves: Any, buffers: Any, sems: Any) -> None:
        self.items, self.leaves, self.buffers, self.sems = items, leaves, buffers, sems
        self.per_block, self.page_size = buffers[0].shape[1:3]

    def first_page(self, i: Any, j: Any) -> jax.Array:
        return _field(self.items, i, FIRST_PAGE) + j * self.per_block

    def first_key(self, i: Any, j: Any) -> jax.Array:
        return self.first_page(i, j) * self.page_size

    def start(self, table: Any, i: Any, j: Any, buffer: Any) -> None:
        """table: the row of item i."""
        first = self.first_page(i, j)
        self._each(i, j, buffer, lambda p: table[0, 0, first + p], lambda copy: copy.start())

    def wait(self, i: Any, j: Any, buffer: Any) -> None:
        self._each(i, j, buffer, lambda p: 0, lambda copy: copy.wait())  # it counts bytes: from where does not matter

    def _each(self, i: Any, j: Any, buffer: Any, page: Any, do: Any) -> None:
        """The pages of block j of item i that are there."""

        def one(p: jax.Array, _: None) -> None:
            for leaf, into in zip(self.leaves, self.buffers, strict=True):
                do(pltpu.make_async_copy(leaf.at[page(p)], into.at[buffer, p], self.sems.at[buffer]))

        rest = _field(self.items, i, END_PAGE) - self.first_page(i, j)
        lax.fori_loop(0, jnp.minimum(self.per_block, rest), one, None)


def _attend_block(
    facts: Facts, item: Any, first_key: Any, queries: Any, buffers: Any, top: Any, total: Any, acc: Any
) -> None:
    """One block of keys for all rows of a block of queries. What is in the buffers past the item's keys is anything, NaN too."""
    heads, rows, _ = acc.shape
    keys = buffers[0].shape[0] * buffers[0].shape[1]
    precision = lax.Precision.HIGHEST if queries[0].dtype == jnp.float32 else None
    first, second = (_by_head(buffer[...], heads) for buffer in buffers)
    scored = (first, second) if facts.latent else (first,)
    values = first if facts.latent else second

    key = first_key + lax.broadcasted_iota(jnp.int32, (rows, keys), 1)
    token = lax.broadcasted_iota(jnp.int32, (rows, keys), 0) // (rows // facts.block) if facts.block > 1 else 0
    position = item(POSITION) + token
    seen = key < item(END_KEY)
    if facts.block > 1:
        seen &= (token >= item(FIRST_ROW)) & (token < item(END_ROW))
        if facts.causal:
            seen &= key <= position
    if facts.window is not None:
        seen &= key > position - facts.window
    stored = first_key + lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
    real = stored < item(END_KEY)
    if facts.window is not None:
        real &= stored > item(POSITION) + item(FIRST_ROW) - facts.window

    for h in range(heads):
        scores = sum(
            lax.dot_general(
                q[0, h], k[h], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=precision
            )
            for q, k in zip(queries, scored, strict=True)
        )
        scores *= facts.scale
        if facts.soft_cap is not None:
            scores = jnp.tanh(scores / facts.soft_cap) * facts.soft_cap
        scores = jnp.where(seen, scores, MASKED)
        old = top[h][:, :1]
        new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new), 0.0)
        decay = jnp.exp(old - new)
        v = jnp.where(real, values[h], jnp.zeros((), values.dtype))
        part = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=precision)
        acc[h] = acc[h] * decay + part
        total[h] = jnp.broadcast_to(total[h][:, :1] * decay + weights.sum(axis=1, keepdims=True), (rows, LANES))
        top[h] = jnp.broadcast_to(new, (rows, LANES))


def _by_head(pages: jax.Array, heads: int) -> jax.Array:
    """[pages, P, Hk, D], or [pages, P, D] of one head -> [Hk, S, D]."""
    flat = pages.reshape(-1, *pages.shape[2:])
    return flat[None] if heads == 1 else jnp.swapaxes(flat, 0, 1)
