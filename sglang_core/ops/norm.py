"""Normalisation. A `1 + w` norm (Gemma) stores `w + 1` as its weight, in float32, when it is loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.ops.codes import CodeKind, Codes, coded
from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide


@op("norm.rms")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., M], weight: [M] (x.dtype or float32) -> [..., M]. float32 inside, one rounding to x.dtype at the end."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(y.dtype)).to(x.dtype)


@op("norm.layer")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x: [..., M], weight, bias: [M] -> [..., M]. float32 inside, one rounding to x.dtype at the end."""
    y = wide(x)
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(y.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


@op("norm.add_rms", composite={"rms": "norm.rms"})
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    rms: Callable[[Tensor, Tensor, float], Tensor] = rms_norm,
) -> tuple[Tensor, Tensor]:
    """x, residual: [T, M], weight: [M] -> y: [T, M], residual: [T, M].

    The new residual is x + residual rounded to x.dtype; y is the norm of that rounded sum.
    """
    residual = x + residual
    return rms(residual, weight, eps), residual


@op("norm.add_rms_quant", composite={"norm": "norm.add_rms"})
def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    kind: CodeKind,
    *,
    norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_rms_norm,
) -> tuple[Codes, Tensor]:
    """x, residual: [T, M], weight: [M] -> y: codes of [T, M], residual: [T, M]. What is quantised is y as it was rounded to x.dtype."""
    y, residual = norm(x, residual, weight, eps)
    return coded(y, kind), residual


@op("norm.rms_gated", composite={"rms": "norm.rms"})
def rms_norm_gated(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    *,
    rms: Callable[[Tensor, Tensor, float], Tensor] = rms_norm,
) -> Tensor:
    """x, gate: [..., M], weight: [M] -> [..., M]: the norm of x, rounded to x.dtype, times silu(gate). float32 inside, one rounding more at the end."""
    return (wide(rms(x, weight, eps)) * F.silu(wide(gate))).to(x.dtype)
