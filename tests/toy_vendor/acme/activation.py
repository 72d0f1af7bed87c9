"""Gated activations on Acme."""

import torch.nn.functional as F
from torch import Tensor


def gated(x: Tensor, kind: str) -> Tensor:
    """x: [T, 2F] -> [T, F]."""
    gate, up = x.float().chunk(2, dim=-1)
    act = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return (act * up).to(x.dtype)
