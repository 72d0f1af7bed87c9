"""kv.write and kv.write_mla: rows into pages, by DMA where a token's row is whole tiles of the pool, else by XLA's scatter."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SCRATCH = 0  # the page that padding is written to: nobody reads it, so nothing is written there


class Written(NamedTuple):
    """What a step writes. rows: [T, Hk, D] of each leaf; scalars: the slot of each token, and whether a whole page begins there."""

    rows: tuple[jax.Array, jax.Array]
    scalars: tuple[jax.Array, jax.Array]


def written(rows: tuple[jax.Array, jax.Array], slots: jax.Array, page_size: int) -> Written:
    """slots: int32[T]."""
    return Written(rows, (slots, whole_pages(slots, page_size)))


def whole_pages(slots: jax.Array, page_size: int) -> jax.Array:
    """int32[T]: 1 where this token and those after it fill a page from its first slot to its last, in order."""
    tokens = slots.shape[0]
    if tokens < page_size:
        return jnp.zeros(tokens, jnp.int32)
    follows = jnp.cumsum(jnp.diff(slots, prepend=slots[:1] - 2) == 1)
    run = follows[page_size - 1 :] - follows[: tokens - page_size + 1] == page_size - 1
    return jnp.pad(run & (slots[: tokens - page_size + 1] % page_size == 0), (0, page_size - 1)).astype(jnp.int32)


def write_rows(scalars: Any, rows: Any, leaves: Any, sem: Any) -> None:
    """In a kernel: copies of whole pages and of single tokens, all started before any is waited for."""
    slots, whole = scalars
    page_size = leaves[0].shape[1]

    def each(do: Any) -> None:
        def copy(t: jax.Array, page: jax.Array, into: Any, count: int | None) -> None:
            @pl.when(page != SCRATCH)
            def _() -> None:
                for new, leaf in zip(rows, leaves, strict=True):
                    row = new.at[t] if count is None else new.at[pl.ds(t, count)]
                    do(pltpu.make_async_copy(row, leaf.at[into], sem))

        def one(t: jax.Array) -> jax.Array:
            page, place = slots[t] // page_size, slots[t] % page_size
            if slots.shape[0] < page_size:
                copy(t, page, (page, place), None)
                return t + 1
            is_whole = whole[t] == 1
            lax.cond(
                is_whole,
                lambda: copy(t, page, page, page_size),
                lambda: copy(t, page, (page, place), None),
            )
            return t + jnp.where(is_whole, page_size, 1)

        lax.while_loop(lambda t: t < slots.shape[0], one, jnp.int32(0))

    each(lambda copy: copy.start())
    each(lambda copy: copy.wait())


def write(new: Written, leaves: tuple[jax.Array, jax.Array], *, interpret: bool) -> tuple[jax.Array, ...]:
    """The leaves, with the rows in them."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def kernel(slots: Any, whole: Any, k: Any, v: Any, _k: Any, _v: Any, k_leaf: Any, v_leaf: Any, sem: Any) -> None:
        write_rows((slots, whole), (k, v), (k_leaf, v_leaf), sem)

    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[anywhere] * 4,
            out_specs=[anywhere] * 2,
            scratch_shapes=[pltpu.SemaphoreType.DMA(())],
        ),
        input_output_aliases={4: 0, 5: 1},
        interpret=interpret,
        name="kv_write",
    )(*new.scalars, *new.rows, *leaves)


def scatter(rows: tuple[jax.Array, ...], leaves: tuple[jax.Array, ...], slots: jax.Array) -> tuple[jax.Array, ...]:
    """The same by XLA: of pools with one head, where a token is part of a tile, which no DMA can write."""
    at = jnp.divmod(slots, leaves[0].shape[1])
    return tuple(leaf.at[at].set(row) for leaf, row in zip(leaves, rows, strict=True))
