"""Quotients and fp8 rounded once, as the ops define them: where XLA would do it twice, codes next to a tie fall on the wrong side."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

FP8, FP8_MAX = jnp.float8_e4m3fn, 448.0
FP8_NORMAL, FP8_STEPS = 2.0**-6, 2.0**9  # the smallest normal number of e4m3fn, and how many steps below it make 1


def divided(x: jax.Array, by: Any) -> jax.Array:
    """x / by, x being floats.

    Of a quotient by a constant or a broadcast XLA makes a product with the reciprocal. Here it sees neither.
    """
    return x / jnp.where(jnp.isnan(x), x, by)


def to_fp8(x: jax.Array) -> jax.Array:
    """x: floats -> the nearest e4m3fn, ties to even, saturated at 448. XLA's conversion on a host goes through float16."""
    x = jnp.clip(x.astype(jnp.float32), -FP8_MAX, FP8_MAX)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    normal = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.abs(x) < FP8_NORMAL, jnp.round(x * FP8_STEPS) / FP8_STEPS, normal).astype(FP8)
