"""attn.paged by jax's ragged paged attention (jax.experimental.pallas.ops.tpu.ragged_paged_attention), with its plan and its writes.

Its pool has keys and values of a head side by side in one leaf (`pools.InterleavedPool`). It takes the lengths of reqs that follow one another
with no gap, none of them empty, and writes nothing: new rows go to the pool by XLA's scatter. On the host it is interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec, Plan
from sglang_tpu.attention import widened
from sglang_tpu.attention_kernel import VMEM_LIMIT
from sglang_tpu.attention_plan import refilled
from sglang_tpu.environment import array, on_device, wrap
from sglang_tpu.jax_interpreted import interpreted

# What jax's table of tuned sizes (tuned_block_sizes.py) has for most heads and page sizes. It ends at contexts of 4096 tokens.
QUERIES, PAGES = 32, 16
BUFFER = 4 << 20  # bytes of a block of pages at most, unless one page has more: there are two


@dataclass(frozen=True, kw_only=True, slots=True)
class ReqsPlan(Plan):
    """`attn.plan`'s result for jax's kernel, with the reference's tiles in it, which watched steps compare with."""

    cu_tokens: Tensor  # int32[R + 1]: of reqs that have tokens, one after the other
    lengths: Tensor  # int32[R]: keys of each, at least as many as tokens
    pages: Tensor  # int32[R, C]
    count: Tensor  # int32[1]: such reqs, at least one
    live: Tensor  # int32[T]: 1 where a token is of a req that has keys

    def buffers(self) -> Iterator[Tensor]:
        yield from Plan.buffers(self)
        yield from (self.cu_tokens, self.lengths, self.pages, self.count, self.live)


class Facts(NamedTuple):
    """What is compiled into a kernel."""

    scale: float
    soft_cap: float | None
    values: int  # Dv: what of a row of values is not filling


def plan(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: ReqsPlan | None = None) -> ReqsPlan:
    """A req that only fills a bucket and has tokens reads scratch, and its results are not looked at; those with none are left out.

    The kernel waits for copies that a req before started for it, so that one without keys would take another's.
    """
    base = OPS["attn.plan"].body(spec, batch, device)
    cu, seq_lens = batch.cu_extend_cpu.numpy(), batch.seq_lens_cpu.numpy()
    extend = np.diff(cu)
    kept = np.flatnonzero(extend > 0)
    real = seq_lens[kept] > 0
    room, count = batch.num_reqs, len(kept)
    cu_tokens = np.zeros(room + 1, np.int32)
    cu_tokens[1:] = cu[-1] if count else 1
    cu_tokens[:count] = cu[kept]
    lengths = np.ones(room, np.int32)
    lengths[:count] = np.where(real, seq_lens[kept], extend[kept])
    pages = np.zeros((room, batch.num_pages), np.int32)
    pages[:count] = np.where(real[:, None], batch.page_table_cpu.numpy()[kept], 0)
    live = np.zeros(batch.num_tokens, np.int32)
    live[: cu[-1]] = np.repeat((seq_lens > 0).astype(np.int32), extend)
    made = ReqsPlan(
        **{field.name: getattr(base, field.name) for field in fields(base)},
        cu_tokens=torch.from_numpy(cu_tokens).to(device),
        lengths=torch.from_numpy(lengths).to(device),
        pages=torch.from_numpy(pages).to(device),
        count=torch.tensor([max(count, 1)], dtype=torch.int32, device=device),
        live=torch.from_numpy(live).to(device),
    )
    return made if out is None else refilled(out, made)


@on_device
def paged(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    pool: Pool,
    layer: int,
    spec: AttnSpec,
    plan: ReqsPlan,
    *,
    sinks: Tensor | None = None,
    lse: bool = False,
) -> Tensor:
    """q: [T, Hq, D] -> o: [T, Hq, Dv]. Writes k and v first. Raises ValueError where a log-sum-exp is asked for: no layer of core's does."""
    if lse:
        raise ValueError("jax's ragged paged attention gives no log-sum-exp; leave out --kernel attn.paged=jax")
    new = None if k is None or v is None else (array(k), array(v))
    facts = Facts(spec.scale, spec.soft_cap, spec.v_head_dim)
    reqs = tuple(array(x) for x in (plan.cu_tokens, plan.lengths, plan.pages, plan.count, plan.live))
    (held,) = pool.layer_leaves(layer)
    o, held._elem = step(facts, array(q), new, array(held), reqs, array(plan.slot_mapping))
    made: Tensor = wrap(o)
    return made


@on_device
def kv_write(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """k: [T, Hk, D], v: [T, Hk, Dv], slot_mapping: int32[T]."""
    (held,) = pool.layer_leaves(layer)
    held._elem = write((array(k), array(v)), array(held), array(slot_mapping))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(
    facts: Facts,
    q: jax.Array,
    new: tuple[jax.Array, jax.Array] | None,
    leaf: jax.Array,
    reqs: tuple[jax.Array, ...],
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """-> o: [T, Hq, Dv], the leaf as it is now. reqs: cu_tokens, lengths, pages, count and live; leaf: [N, P, 2 Hk, W]."""
    cu_tokens, lengths, pages, count, live = reqs
    tokens, num_heads, _ = q.shape
    if new is not None:
        leaf = write(new, leaf, slots)
    if not tokens:
        return jnp.zeros((0, num_heads, facts.values), q.dtype), leaf
    kernel = partial(
        ragged_paged_attention,
        sm_scale=facts.scale,
        soft_cap=facts.soft_cap,
        num_kv_pages_per_block=pages_per_block(leaf.shape, leaf.dtype.itemsize, pages.shape[1]),
        num_queries_per_block=min(QUERIES, tokens),
        vmem_limit_bytes=VMEM_LIMIT,
    )
    args = (widened(q, leaf.shape[-1]), leaf, lengths, pages, cu_tokens, count)
    o = lax.platform_dependent(*args, cpu=interpreted(kernel), tpu=kernel)
    return jnp.where(live[:, None, None] == 1, o[..., : facts.values], 0), leaf


@partial(jax.jit, donate_argnums=1)
def write(new: tuple[jax.Array, jax.Array], leaf: jax.Array, slots: jax.Array) -> jax.Array:
    """The leaf, with k: [T, Hk, D] and v: [T, Hk, Dv] at these slots."""
    k, v = (widened(x, leaf.shape[-1]).astype(leaf.dtype) for x in new)
    rows = jnp.stack([k, v], axis=2).reshape(len(slots), *leaf.shape[2:])
    return leaf.at[jnp.divmod(slots, leaf.shape[1])].set(rows)


def pages_per_block(leaf: tuple[int, ...], itemsize: int, columns: int) -> int:
    """leaf: [N, P, 2 Hk, W]; columns: of the page table."""
    page = leaf[1] * leaf[2] * leaf[3] * itemsize
    return max(1, min(PAGES, columns, BUFFER // page))
