"""act.gated (csrc/rows.inl)."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api.ops import GateKind
from sglang_xeon.library import ops

_gated = ops.gated.default
KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # enum Gate of csrc/isa.h


def gated(x: Tensor, kind: GateKind) -> Tensor:
    """x: [..., 2F] -> [..., F]."""
    if x.dim() == 2:
        return _gated(x, KINDS[kind])  # type: ignore[no-any-return]
    return _gated(x.flatten(0, -2), KINDS[kind]).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
