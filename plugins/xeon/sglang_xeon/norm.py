"""norm.rms, norm.rms_gated, norm.add_rms and norm.layer (csrc/rows.inl)."""

from __future__ import annotations

from torch import Tensor

from sglang_xeon.library import ops

_rms, _rms_gated = ops.rms_norm.default, ops.rms_norm_gated.default
_add_rms, _layer = ops.add_rms_norm.default, ops.layer_norm.default


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., M], weight: [M] -> [..., M]."""
    return _rms(x, weight, eps)  # type: ignore[no-any-return]


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate: [..., M], weight: [M] -> [..., M]."""
    return _rms_gated(x, gate, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, M] -> y: [T, M], residual: [T, M]."""
    return _add_rms(x, residual, weight, eps)  # type: ignore[no-any-return]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x: [..., M], weight, bias: [M] -> [..., M]."""
    return _layer(x, weight, bias, eps)  # type: ignore[no-any-return]
