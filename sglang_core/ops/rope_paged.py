"""`attn.rope_paged`: all that an attention layer does between its projections, as one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sglang_core.backend.pool import Pool
from sglang_core.ops.attention import AttnSpec, Plan, attn_paged
from sglang_core.ops.norm import rms_norm
from sglang_core.ops.registry import op
from sglang_core.ops.rope import RopeSpec, rope_apply


class HeadNorms(NamedTuple):
    """RMS norms of every head of the queries and of the keys, before they are rotated."""

    q: Tensor  # [D], in q.dtype or float32
    k: Tensor
    eps: float


@op("attn.rope_paged", composite={"norm": "norm.rms", "rope": "rope.apply", "paged": "attn.paged"})
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
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm,
    rope: Callable[..., tuple[Tensor, Tensor]] = rope_apply,
    paged: Callable[..., Tensor | tuple[Tensor, Tensor]] = attn_paged,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise q and k where there are head norms, rotate them, write k and v, then attend.

    q: [T, Hq, D], k: [T, Hk, D], v: [T, Hk, Dv], positions: int32[T], table: float32[L, rotary_dim], sinks: [Hq]
    -> o: [T, Hq, Dv] (, lse: float32[T, Hq]). What the pool gets is the rotated key, rounded to k.dtype first. Each step rounds to the
    inputs' dtype, as its op says.
    """
    if head_norms is not None:
        q, k = norm(q, head_norms.q, head_norms.eps), norm(k, head_norms.k, head_norms.eps)
    q, k = rope(q, k, positions, table, rotary)
    return paged(q, k, v, pool, layer, spec, plan, sinks=sinks, lse=lse)
