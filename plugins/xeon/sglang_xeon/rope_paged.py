"""attn.rope_paged: head norms, rotation and the write to the pool in one pass (csrc/rope_write.inl), then attention."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, HeadNorms, Plan, RopeSpec
from sglang_xeon.attention import paged, stores
from sglang_xeon.library import ops

_rope_write = ops.rope_write.default


def rope_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    rotary: RopeSpec,
    pool: Pool,
    layer: int,
    spec: AttnSpec,
    plan: Plan,
    *,
    head_norms: HeadNorms | None = None,
    sinks: Tensor | None = None,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [T, Hk, D], v: [T, Hk, Dv], table: float32[L, rotary_dim] -> o: [T, Hq, Dv] (, lse: float32[T, Hq])."""
    q_weight, k_weight, eps = head_norms or (None, None, 0.0)
    at = positions, table, rotary.style == "interleaved"
    q = _rope_write(q, k, v, *at, q_weight, k_weight, eps, *stores(pool, layer), plan.slot_mapping)
    return paged(q, None, None, pool, layer, spec, plan, sinks=sinks, lse=lse)
