"""moe.fused: two grouped products over rows that are laid out once, by the experts that have any."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from torch import Tensor

from sglang_core.api.ops import ExpertSpec, PackedWeight
from sglang_tpu.environment import array, on_device, wrap
from sglang_tpu.groups import grouping, product


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
    """As the op, of stacks in tiles, or dense ones as they are. Rounds where the op's body does."""
    bias = [None if b is None else array(b) for b in (bias13, bias2)]
    remote = None if expert_map is None else array(expert_map)
    made: Tensor = wrap(_fused(array(x), (w13, w2), array(weights), array(ids), act, bias, remote))
    return made


def _fused(
    x: jax.Array,
    w: tuple[PackedWeight, PackedWeight],
    weights: jax.Array,
    ids: jax.Array,
    act: ExpertSpec,
    bias: list[jax.Array | None],
    expert_map: jax.Array | None,
) -> jax.Array:
    (num_tokens, k), num_experts = ids.shape, w[0].num_experts
    assert num_experts is not None, "moe.fused takes stacks of experts"
    if num_tokens == 0:
        return x
    flat = ids.reshape(-1)
    local = flat if expert_map is None else expert_map[flat]
    held = local >= 0
    at = grouping(jnp.where(held, local, num_experts).astype(jnp.int32), num_experts, [each.fmt for each in w])
    rows = x[at.source // k]
    if act.weight_on_input:
        rows = (rows.astype(jnp.float32) * weights.reshape(-1)[at.source, None]).astype(x.dtype)
    h = activated(product(rows, w[0], at, bias[0]), act)
    y = product(h, w[1], at, bias[1])[at.place].astype(jnp.float32)
    y = jnp.where(held[:, None], y, 0.0).reshape(num_tokens, k, -1)
    return (y if act.weight_on_input else y * weights[..., None]).sum(1).astype(x.dtype)


def activated(x: jax.Array, act: ExpertSpec) -> jax.Array:
    """x: [S, 2F], gate then up -> [S, F]. float32 inside, one rounding to x.dtype at the end."""
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    match act.activation:
        case "swiglu_clamped":
            gate, up = jnp.minimum(gate, act.limit), jnp.clip(up, -act.limit, act.limit)
            made = gate * jax.nn.sigmoid(act.alpha * gate) * (up + 1)
        case "silu":
            made = jax.nn.silu(gate) * up
        case "gelu" | "gelu_tanh":
            made = jax.nn.gelu(gate, approximate=act.activation == "gelu_tanh") * up
    return made.astype(x.dtype)
