"""gemm.grouped and moe.fused by jax's megablox (jax.experimental.pallas.ops.tpu.megablox): products of rows that lie by expert, one after the other.

Rows are not filled up by expert, as ours are: a tile that two experts share is visited for each. Dense weights only. On the host it is interpreted.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
from torch import Tensor

from sglang_core.api.ops import ExpertSpec, PackedWeight
from sglang_tpu.environment import array, on_device, wrap
from sglang_tpu.moe import activated

SUBLANES, LANES, MOST_ROWS = 16, 128, 128
BLOCK = (
    2 << 20
)  # bytes of a matrix at a time: two of them, the rows and the sums are in the 16 MiB that the compiler gives


@on_device
def grouped(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the op, of a dense stack."""
    rows, sizes = array(x), array(group_sizes)
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")  # of rows past the last end: one too many
    y = _product(rows, array(w["weight"]), sizes, group, None if bias is None else array(bias))
    made: Tensor = wrap(jnp.where((group < len(sizes))[:, None], y, 0))
    return made


@on_device
def fused(
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    weights: Tensor,
    ids: Tensor,
    act: ExpertSpec,
    *,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """As the op, of dense stacks. Rounds where the op's body does."""
    stacks = (array(w13["weight"]), array(w2["weight"]))
    bias = tuple(None if b is None else array(b) for b in (bias13, bias2))
    remote = None if expert_map is None else array(expert_map)
    made: Tensor = wrap(_fused(array(x), stacks, array(weights), array(ids), act, bias, remote))
    return made


def _fused(
    x: jax.Array,
    stacks: tuple[jax.Array, jax.Array],
    weights: jax.Array,
    ids: jax.Array,
    act: ExpertSpec,
    bias: tuple[jax.Array | None, ...],
    expert_map: jax.Array | None,
) -> jax.Array:
    (num_tokens, k), num_experts = ids.shape, stacks[0].shape[0]
    flat = ids.reshape(-1)
    local = flat if expert_map is None else expert_map[flat]
    held = local >= 0
    group = jnp.where(held, local, num_experts).astype(
        jnp.int32
    )  # experts of other ranks come last, and are multiplied by none
    order = jnp.argsort(group, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    sizes = jnp.zeros(num_experts + 1, jnp.int32).at[group].add(1)[:-1]
    rows = x[order // k]
    if act.weight_on_input:
        rows = (rows.astype(jnp.float32) * weights.reshape(-1)[order, None]).astype(x.dtype)
    h = activated(_product(rows, stacks[0], sizes, group[order], bias[0]), act)
    y = _product(h, stacks[1], sizes, group[order], bias[1])[place].astype(jnp.float32)
    y = jnp.where(held[:, None], y, 0.0).reshape(num_tokens, k, -1)
    return (y if act.weight_on_input else y * weights[..., None]).sum(1).astype(x.dtype)


def _product(
    rows: jax.Array, stack: jax.Array, sizes: jax.Array, group: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """rows: [S, in], of expert after expert; stack: [X, out, in]; group: int32[S] -> [S, out]; rows of no expert are undefined."""
    count, (num_experts, width, depth) = rows.shape[0], stack.shape
    if not count:
        return jnp.zeros((0, width), rows.dtype)
    height, block = tile(count, width, depth, rows.dtype.itemsize)
    by_rows = depth % LANES == 0  # XLA keeps a matrix of broken rows by columns: megablox takes it as it lies
    filled = jnp.pad(rows, ((0, -count % height), (0, 0)))
    kernel = partial(
        gmm,
        preferred_element_type=rows.dtype if bias is None else jnp.float32,
        tiling=(height, depth, block),
        transpose_rhs=by_rows,
    )
    stack = stack if by_rows else stack.swapaxes(1, 2)
    y = lax.platform_dependent(filled, stack, sizes, cpu=partial(kernel, interpret=True), tpu=kernel)[:count]
    if bias is None:
        return y
    return (y + bias[jnp.minimum(group, num_experts - 1)].astype(jnp.float32)).astype(rows.dtype)


def tile(rows: int, width: int, depth: int, itemsize: int) -> tuple[int, int]:
    """Rows and output columns of a step of the grid. A matrix's rows stay whole: then it is read once for all tiles of its expert."""
    height = min(MOST_ROWS, -(-rows // SUBLANES) * SUBLANES)
    return height, min(width, max(LANES, BLOCK // (depth * itemsize) // LANES * LANES))
