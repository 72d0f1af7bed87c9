"""How op bodies round: compute wide, round once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the input is float64: so the same body, given float64 inputs, is its own oracle."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype that bodies compute in."""
    return x.to(wide_dtype(x.dtype))
