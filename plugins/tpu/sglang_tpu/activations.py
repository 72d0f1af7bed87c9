"""Activations quantised as weight formats ask for (`sglang_core/ops/quant.py`), by XLA, which fuses it into what made them.

Codes are the definition's (`rounding.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sglang_core.api.ops import Fmt
from sglang_tpu.rounding import FP8_MAX, divided, to_fp8

INT8_MAX, E2M1_MAX = 127.0, 6.0
BLOCK = 128
TILE_ROWS = 8


class Rows(NamedTuple):
    """Rows to multiply, [S, in]: numbers as they are, or codes with what undoes them."""

    x: jax.Array
    scale: jax.Array | None = None  # float32[S, 1]; of fp8_block [S, ceil(in / 128)]
    zero: jax.Array | None = None  # int32[S, 1], to be taken from each code


def quantized(x: jax.Array, fmt: Fmt, static_scale: jax.Array | None = None) -> Rows:
    """x: [S, in] -> what a product with a weight in `fmt` sums. `static_scale`: float32[S or 1, 1], of static formats."""
    if fmt.activation == "as_is":
        return Rows(x)
    dtype = x.dtype
    if fmt.activation == "fp8_block":
        return _fp8_block(x)
    if fmt.activation in ("nvfp4", "nvfp4_static"):
        return _nvfp4(x, static_scale)
    x = x.astype(jnp.float32)
    match fmt.activation:
        case "int8":
            scale = _scale(_amax(x), INT8_MAX)
            return Rows(jnp.clip(jnp.round(divided(x, scale)), -INT8_MAX, INT8_MAX).astype(jnp.int8), scale)
        case "int8_asym":
            return _int8_asym(x)
    if fmt.static:
        assert static_scale is not None
        scale = jnp.broadcast_to(static_scale, (x.shape[0], 1))
    else:
        scale = _scale(_amax(x), FP8_MAX)
    codes = to_fp8(divided(x, scale))
    return Rows(codes if fmt.element == "fp8" else codes.astype(dtype), scale)


def _int8_asym(x: jax.Array) -> Rows:
    low = jnp.minimum(x.min(-1, keepdims=True), 0)
    high = jnp.maximum(x.max(-1, keepdims=True), 0)
    scale = _scale(high - low, 255.0)
    zero = jnp.clip(-128 - jnp.round(divided(low, scale)), -128, 127)
    codes = jnp.clip(jnp.round(divided(x, scale)) + zero, -128, 127)
    return Rows(codes.astype(jnp.int8), scale, zero.astype(jnp.int32))


def _fp8_block(x: jax.Array) -> Rows:
    """Codes in the order that a TPU's memory has: tiles of 8 rows of a block. In any other, all of x would be copied as float32.

    The maxima are of slices: libtpu 0.0.42 aborts on those of tiles for 7x, whose bfloat16 lies in tiles of 16 rows.
    """
    tokens, columns = x.shape
    padded = jnp.pad(x, ((0, -tokens % TILE_ROWS), (0, -columns % BLOCK)))
    rows, wide = padded.shape
    blocks = [padded[:, start : start + BLOCK] for start in range(0, wide, BLOCK)]
    scale = _scale(jnp.concatenate([_amax(block) for block in blocks], axis=1).astype(jnp.float32), FP8_MAX)
    tiles, of_tiles = (
        y.reshape(-1, TILE_ROWS, len(blocks), y.shape[1] // len(blocks)).swapaxes(1, 2) for y in (padded, scale)
    )
    codes = to_fp8(divided(tiles.astype(jnp.float32), of_tiles)).swapaxes(1, 2).reshape(rows, wide)
    return Rows(codes[:tokens, :columns], scale[:tokens])


def _nvfp4(x: jax.Array, static_scale: jax.Array | None) -> Rows:
    """Codes with the scales of their groups: six bits at most, and so exact in bfloat16. The scale of a row remains."""
    total = _scale(_amax(x.astype(jnp.float32)), E2M1_MAX * FP8_MAX) if static_scale is None else static_scale
    total = jnp.broadcast_to(total, (x.shape[0], 1))
    groups = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 16))).reshape(x.shape[0], -1, 16).astype(jnp.float32)
    scale = to_fp8(divided(divided(_amax(groups), E2M1_MAX), total[..., None])).astype(jnp.float32)
    whole = scale * total[..., None]
    value = jnp.where(whole == 0, 0.0, _to_e2m1(divided(groups, jnp.where(whole == 0, 1.0, whole)))) * scale
    return Rows(value.reshape(x.shape[0], -1)[:, : x.shape[1]].astype(jnp.bfloat16), total)


def _to_e2m1(x: jax.Array) -> jax.Array:
    """x: float32 -> the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with its sign, saturated; ties to the even code."""
    size = jnp.minimum(jnp.abs(x), E2M1_MAX)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    return jnp.sign(x) * jnp.round(size / step) * step


def _amax(x: jax.Array) -> jax.Array:
    return jnp.abs(x).max(-1, keepdims=True)


def _scale(amax: jax.Array, top: float) -> jax.Array:
    scale = divided(amax, top)
    return jnp.where(scale == 0, 1.0, scale)
