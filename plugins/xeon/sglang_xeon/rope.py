"""rope.apply (csrc/rows.inl)."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api.ops import RopeSpec
from sglang_xeon.library import ops

_rope = ops.rope.default


def rope_apply(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [T, Hk, D], positions: int32[T], table: float32[L, rotary_dim] -> q, k rotated."""
    return _rope(q, k, positions, table, spec.style == "interleaved")  # type: ignore[no-any-return]
