"""act.gated: npu_swiglu, and PyTorch's operators for the rest."""

from __future__ import annotations

import torch.nn.functional as F
import torch_npu
from torch import Tensor

from sglang_core.api.ops import GateKind


def gated(x: Tensor, kind: GateKind) -> Tensor:
    """x: [..., 2F], gate then up -> [..., F]."""
    if kind == "silu" and x.numel():
        y: Tensor = torch_npu.npu_swiglu(x, dim=-1)
        return y
    gate, up = x.float().chunk(2, dim=-1)
    act = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return (act * up).to(x.dtype)
