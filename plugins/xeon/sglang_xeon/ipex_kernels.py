"""Ops by Intel Extension for PyTorch's public functions. Importing this imports it."""

from __future__ import annotations

from intel_extension_for_pytorch.llm import functional
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., M], weight: [M] -> [..., M]."""
    return functional.rms_norm(x, weight, eps)  # type: ignore[no-any-return]
