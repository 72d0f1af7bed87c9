"""Rows that meet different matrices of a stack, laid out so that each tile of them meets one (`matmul.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sglang_core.api.ops import Fmt, PackedWeight
from sglang_tpu import matmul
from sglang_tpu.activations import quantized
from sglang_tpu.environment import array
from sglang_tpu.matmul import Tiles

HEIGHTS = (16, 32, 64, 128, 256)
LEAST_OF_CODES = 32  # rows of 8 bits are in registers by so many
FETCH_ROWS = 32  # reading a matrix takes as long as multiplying so many rows by it, or more
EXPERT_BYTES = 8 << 20  # of a stack that a step of the grid reads: an expert whole, if it fits


class Grouping(NamedTuple):
    """Where S rows lie in tiles."""

    tiles: Tiles
    place: jax.Array  # int32[S], its row among the tiles'; that of a row of no group means nothing
    source: jax.Array  # int32[tiles * height], the row that lies there; 0 where none does


def grouping(group: jax.Array, num_groups: int, fmts: Iterable[str]) -> Grouping:
    """group: int32[S] of each row, S > 0; num_groups where it belongs to none. `fmts`: of the weights that the rows will meet."""
    num_rows = group.shape[0]
    least = HEIGHTS[0] if all(Fmt.parse(fmt).activation == "as_is" for fmt in fmts) else LEAST_OF_CODES
    height, num_tiles = _tiling(num_rows, num_groups, least)
    sizes = jnp.zeros(num_groups + 1, jnp.int32).at[group].add(1)
    ends = jnp.cumsum((sizes[:-1] + height - 1) // height).astype(jnp.int32)  # in tiles
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    starts = jnp.cumsum(sizes).astype(jnp.int32) - sizes  # in rows of that order
    rank = jnp.zeros(num_rows, jnp.int32).at[order].set(jnp.arange(num_rows, dtype=jnp.int32)) - starts[group]
    place = jnp.where(group < num_groups, first[group] * height + rank, num_tiles * height)
    source = jnp.zeros(num_tiles * height, jnp.int32).at[place].set(jnp.arange(num_rows, dtype=jnp.int32), mode="drop")
    count = jnp.maximum(ends[-1:], 1)
    tile = jnp.minimum(jnp.arange(num_tiles, dtype=jnp.int32), count - 1)
    expert = jnp.minimum(jnp.sum(tile[:, None] >= ends, axis=1, dtype=jnp.int32), num_groups - 1)
    return Grouping(Tiles(height, expert, count), jnp.minimum(place, num_tiles * height - 1), source)


def product(rows: jax.Array, w: PackedWeight, at: Grouping, bias: jax.Array | None) -> jax.Array:
    """rows: [tiles * height, in] -> [tiles * height, out]; rows of no tile are undefined. bias: [X, out]."""
    fmt = Fmt.parse(w.fmt)
    tensors = {name: array(t) for name, t in w._buffers.items() if t is not None}
    static_scale = None
    if fmt.static:
        static_scale = jnp.repeat(tensors["x_scale"][at.tiles.expert], at.tiles.height, axis=0)
    return matmul.product(
        quantized(rows, fmt, static_scale),
        tensors,
        bias,
        at.tiles,
        fmt=fmt,
        out_features=w.out_features,
        dtype=rows.dtype,
        block_bytes=EXPERT_BYTES,
    )


def _tiling(num_rows: int, num_groups: int, least: int) -> tuple[int, int]:
    """Height of the tiles, `least` or more, and how many there are at most: every group that has rows may end in a tile that is not full."""

    def most(height: int) -> int:
        return (num_rows + min(num_rows, num_groups) * (height - 1)) // height

    height = min((h for h in HEIGHTS if h >= least), key=lambda height: most(height) * (FETCH_ROWS + height))
    return height, most(height)
