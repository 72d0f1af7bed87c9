"""attn.paged and attn.mla_paged: what the kernel of `attention_kernel` is called with, from PyTorch's side and from JAX's.

Queries go in with the rows of a block together, [B, Hk, rows, D]: XLA does that on its way out of the rotary embedding. In a program for the host
the kernel is interpreted, in one for a TPU compiled: that is settled where a program is lowered, so a host compiles for TPUs too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, MLASpec
from sglang_tpu.attention_kernel import LANES, Facts, attend
from sglang_tpu.attention_plan import ItemPlan
from sglang_tpu.environment import array, on_device, wrap
from sglang_tpu.kv_write import scatter, write, written

Arrays = tuple[jax.Array, ...]


@on_device
def paged(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    pool: Pool,
    layer: int,
    spec: AttnSpec,
    plan: ItemPlan,
    *,
    sinks: Tensor | None = None,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]). Writes k and v first."""
    new = None if k is None or v is None else (array(k), array(v))
    given = None if sinks is None else array(sinks)
    facts = facts_of(spec, plan.static.block, latent=False, lse=lse)
    return _run(facts, (array(q),), new, pool, layer, plan, given)


@on_device
def mla_paged(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor | None,
    k_pe: Tensor | None,
    pool: Pool,
    layer: int,
    spec: MLASpec,
    plan: ItemPlan,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q_nope: [T, Hq, rank], q_pe: [T, Hq, rope_dim] -> o: [T, Hq, rank] (, lse: float32[T, Hq]). Writes c_kv, k_pe first."""
    new = None if c_kv is None or k_pe is None else (array(c_kv)[:, None], array(k_pe)[:, None])
    facts = facts_of(spec.latent, plan.static.block, latent=True, lse=lse)
    return _run(facts, (array(q_nope), array(q_pe)), new, pool, layer, plan, None)


@on_device
def kv_write(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """k: [T, Hk, D], v: [T, Hk, Dv], slot_mapping: int32[T]. Page 0 is not written to."""
    _write((array(k), array(v)), pool, layer, slot_mapping)


@on_device
def kv_write_mla(c_kv: Tensor, k_pe: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """c_kv: [T, rank], k_pe: [T, rope_dim], slot_mapping: int32[T]. Page 0 is not written to."""
    _write((array(c_kv)[:, None], array(k_pe)[:, None]), pool, layer, slot_mapping)


def facts_of(spec: AttnSpec, block: int, *, latent: bool, lse: bool) -> Facts:
    return Facts(
        scale=spec.scale,
        causal=spec.causal,
        window=spec.window,
        soft_cap=spec.soft_cap,
        has_sinks=spec.has_sinks,
        latent=latent,
        values=spec.v_head_dim,
        block=block,
        lse=lse,
    )


def _run(
    facts: Facts,
    queries: Arrays,
    new: Arrays | None,
    pool: Pool,
    layer: int,
    plan: ItemPlan,
    sinks: jax.Array | None,
) -> Any:
    held = pool.layer_leaves(layer)
    items = tuple(array(x) for x in (plan.items, plan.count, plan.page_table, plan.live, plan.slot_mapping))
    made, leaves = step(facts, queries, new, tuple(array(leaf) for leaf in held), items, sinks)
    _rebind(held, leaves)
    return tuple(wrap(x) for x in made) if facts.lse else wrap(made[0])


def _write(new: Arrays, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    held = pool.layer_leaves(layer)
    _rebind(held, write_step(new, tuple(array(leaf) for leaf in held), array(slot_mapping)))


def _rebind(held: list[Any], leaves: Arrays) -> None:
    for tensor, leaf in zip(held, leaves, strict=True):
        tensor._elem = leaf


@partial(jax.jit, static_argnums=0, donate_argnums=3)  # within a step's trace, the step's own donation counts
def step(
    facts: Facts, queries: Arrays, new: Arrays | None, leaves: Arrays, plan: Arrays, sinks: jax.Array | None
) -> tuple[Arrays, Arrays]:
    """-> (o: [T, Hq, Dv] (, lse: float32[T, Hq])), the leaves as they are now.

    queries: [T, Hq, D] each; new: [T, Hk, D] and [T, Hk, Dv]; leaves: [N, P, Hk, D] and [N, P, Hk, Dv]; sinks: [Hq].
    plan: items, count, page table, live and slots.
    """
    items, count, table, live, slots = plan
    tokens, num_heads, _ = queries[0].shape
    heads, page_size = leaves[0].shape[2], leaves[0].shape[1]
    group = num_heads // heads
    if new is not None:
        new = _as_stored(new, leaves)
    if not tokens:
        o = jnp.zeros((0, num_heads, facts.values), queries[0].dtype)
        return ((o, jnp.zeros((0, num_heads), jnp.float32)) if facts.lse else (o,)), leaves
    shapes = [leaf.shape for leaf in leaves]
    if new is not None and heads == 1:
        leaves, new = scatter(new, leaves, slots), None
    if heads == 1:
        leaves = tuple(leaf[:, :, 0] for leaf in leaves)
    wide = (widened(q, leaf.shape[-1]) for q, leaf in zip(queries, leaves, strict=False))
    laid = tuple(_to_blocks(q, heads, facts.block) for q in wide)
    rows = facts.block * group
    if sinks is not None:
        of_row = jnp.tile(sinks.astype(jnp.float32).reshape(heads, 1, group), (1, facts.block, 1))
        sinks = jnp.broadcast_to(of_row.reshape(heads, rows, 1), (heads, rows, LANES))
    news = None if new is None else written(new, slots, page_size)
    made = on_platform(attend, facts, (items, count, table), laid, leaves, news, sinks)
    o, *rest = made
    lse, changed = (rest[0], rest[1:]) if facts.lse else (None, rest)
    is_live = live[:, None] == 1
    o = jnp.where(is_live[..., None], _from_blocks(o, tokens, facts.block)[..., : facts.values], 0)
    outputs = (o,)
    if lse is not None:
        outputs += (jnp.where(is_live, _from_blocks(lse, tokens, facts.block)[..., 0], -jnp.inf),)
    leaves = tuple(leaf.reshape(shape) for leaf, shape in zip(changed or leaves, shapes, strict=True))
    return outputs, leaves


@partial(jax.jit, donate_argnums=1)
def write_step(new: Arrays, leaves: Arrays, slots: jax.Array) -> Arrays:
    """The leaves, with new: [T, Hk, D] each at these slots."""
    if not slots.shape[0]:
        return leaves
    rows = _as_stored(new, leaves)
    if leaves[0].shape[2] == 1:
        return scatter(rows, leaves, slots)
    return tuple(on_platform(write, written(rows, slots, leaves[0].shape[1]), leaves))


def on_platform(kernel: Callable[..., Any], *args: Any) -> Any:
    """Interpreted by XLA in a program for the host, compiled by Mosaic in one for a TPU.

    Facts are static: they are the first argument where there are any.
    """
    facts, arrays = (args[:1], args[1:]) if isinstance(args[0], Facts) else ((), args)
    run = partial(kernel, *facts)
    return lax.platform_dependent(*arrays, cpu=partial(run, interpret=True), tpu=partial(run, interpret=False))


def _as_stored(rows: Arrays, leaves: Arrays) -> Arrays:
    return tuple(widened(x, leaf.shape[-1]).astype(leaf.dtype) for x, leaf in zip(rows, leaves, strict=True))


def widened(x: jax.Array, width: int) -> jax.Array:
    """[..., D] -> [..., width], with zeros: they add nothing to a score."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))


def _to_blocks(q: jax.Array, heads: int, block: int) -> jax.Array:
    """[T, Hq, D] -> [B, Hk, block * group, D]."""
    tokens, num_heads, width = q.shape
    blocks = -(-tokens // block)
    q = jnp.pad(q, ((0, blocks * block - tokens), (0, 0), (0, 0)))
    q = q.reshape(blocks, block, heads, num_heads // heads, width).transpose(0, 2, 1, 3, 4)
    return q.reshape(blocks, heads, -1, width)


def _from_blocks(o: jax.Array, tokens: int, block: int) -> jax.Array:
    """The inverse, of the first `tokens`."""
    blocks, heads, rows, width = o.shape
    o = o.reshape(blocks, heads, block, rows // block, width).transpose(0, 2, 1, 3, 4)
    return o.reshape(blocks * block, -1, width)[:tokens]
