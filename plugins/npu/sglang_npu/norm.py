"""Norms by npu_rms_norm and npu_add_rms_norm."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., M], weight: [M] -> [..., M] in x.dtype. The vendor's op wants both in one dtype: a weight in float32 takes x along."""
    if not x.numel():
        return torch.empty_like(x)
    y: Tensor = torch_npu.npu_rms_norm(x.to(weight.dtype), weight, eps)[0]
    return y.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, M], weight: [M] -> y: [T, M], residual: [T, M]."""
    if not x.numel() or weight.dtype != x.dtype:  # the sum is rounded to x.dtype, whatever the norm is computed in
        residual = x + residual
        return rms_norm(residual, weight, eps), residual
    y, _, residual = torch_npu.npu_add_rms_norm(x, residual, weight, eps)
    return y, residual
