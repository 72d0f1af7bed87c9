"""Tensors as rows, without a copy where strides allow."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x: [..., M], not empty -> [n, M] whose last dim is dense; a view of x if there is such a view."""
    return dense_last(x).reshape(-1, x.shape[-1])


def as_heads(x: Tensor) -> Tensor:
    """x: [..., M], not empty -> [n, H, M] whose last dim is dense; the three dims of a slice of some heads are kept apart."""
    x = dense_last(x)
    return x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])


def dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
