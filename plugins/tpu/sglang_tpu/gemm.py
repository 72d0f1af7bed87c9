"""gemm.linear and gemm.grouped: dense linear layers by XLA, which has the whole step before it; quantised and grouped ones in Pallas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from torch import Tensor

from sglang_core.api.ops import Fmt, PackedWeight
from sglang_tpu import matmul
from sglang_tpu.activations import quantized
from sglang_tpu.environment import array, on_device, wrap
from sglang_tpu.groups import Grouping, grouping, product

# Of a weight that a step of the grid reads: several steps, so that all but the first read comes beside a product.
LINEAR_BYTES = 2 << 20


@on_device
def linear_dense(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As the op. Sums in float32, for float32 on every digit of it; adds the bias; rounds once."""
    rows, weight = array(x), array(w["weight"])
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    y = jnp.einsum("...i,oi->...o", rows, weight, preferred_element_type=jnp.float32, precision=precision)
    made: Tensor = wrap((y if bias is None else y + array(bias).astype(jnp.float32)).astype(rows.dtype))
    return made


@on_device
def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As the op, of a weight in tiles (`weights.py`)."""
    rows, fmt = array(x), Fmt.parse(w.fmt)
    y = _linear(rows.reshape(-1, w.in_features), w, None if bias is None else array(bias), fmt)
    made: Tensor = wrap(y.reshape(*rows.shape[:-1], w.out_features))
    return made


def _linear(x: jax.Array, w: PackedWeight, bias: jax.Array | None, fmt: Fmt) -> jax.Array:
    if x.shape[0] == 0:
        return jnp.zeros((0, w.out_features), x.dtype)
    tensors = {name: array(t)[None] for name, t in w._buffers.items() if t is not None}
    rows = quantized(x, fmt, tensors.get("x_scale"))
    return matmul.product(
        rows,
        tensors,
        None if bias is None else bias[None],
        matmul.whole(*rows.x.shape, rows.x.dtype.itemsize),
        fmt=fmt,
        out_features=w.out_features,
        dtype=x.dtype,
        block_bytes=LINEAR_BYTES,
    )[: x.shape[0]]


@on_device
def grouped(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the op, of a stack in tiles, or a dense one as it is."""
    made: Tensor = wrap(_grouped(array(x), w, array(group_sizes), None if bias is None else array(bias)))
    return made


def _grouped(x: jax.Array, w: PackedWeight, sizes: jax.Array, bias: jax.Array | None) -> jax.Array:
    if x.shape[0] == 0:
        return jnp.zeros((0, w.out_features), x.dtype)
    row = jnp.arange(x.shape[0], dtype=jnp.int32)
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    group = jnp.sum(row[:, None] >= ends, axis=1, dtype=jnp.int32)  # of rows past the last end: one too many
    at: Grouping = grouping(group, sizes.shape[0], [w.fmt])
    y = product(x[at.source], w, at, bias)
    return jnp.where((group < sizes.shape[0])[:, None], y[at.place], 0)
