"""logits.mask, logits.adjust and logits.soft_cap (csrc/logits.inl)."""

from __future__ import annotations

from torch import Tensor

from sglang_xeon.library import ops

_mask, _adjust, _soft_cap = ops.mask.default, ops.adjust.default, ops.soft_cap.default


def mask(logits: Tensor, bitmask: Tensor) -> Tensor:
    """logits: [R, V], bitmask: int32[R, ceil(V / 32)] -> [R, V]."""
    return _mask(logits, bitmask)  # type: ignore[no-any-return]


def adjust(logits: Tensor, rows: Tensor, ids: Tensor, repetition: Tensor, add: Tensor) -> Tensor:
    """logits: [R, V]; rows, ids: int32[E]; repetition, add: float32[E] -> float32[R, V], a new tensor."""
    return _adjust(logits, rows, ids, repetition, add)  # type: ignore[no-any-return]


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """logits: [R, V] -> float32[R, V]."""
    return _soft_cap(logits, cap)  # type: ignore[no-any-return]
