"""gemm.linear and gemm.linear_gated in every format, on weights packed once (weights.py, csrc/linear.inl)."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api.ops import GateKind, PackedWeight
from sglang_xeon.activation import KINDS
from sglang_xeon.library import ops
from sglang_xeon.weights import LAYOUT, PLAIN, facts, operands, pack, unpack

__all__ = ["LAYOUT", "linear", "linear_amx", "linear_gated", "linear_gated_amx", "pack", "unpack"]

NO_GATE = -1

_linear, _coded = ops.linear.default, ops.linear_coded.default


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in] -> [..., out]. Each output is one float32 sum in an order that only the weight decides, whatever the batch."""
    return _run(x, w, bias, NO_GATE, False)


def linear_amx(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As `linear`, on AMX tiles where there are rows enough: those sum the even and the odd k of 32 apart."""
    return _run(x, w, bias, NO_GATE, True)


def linear_gated(x: Tensor, w: PackedWeight, kind: GateKind, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w: [2F, in] -> [..., F]: the bits of `linear` and act.gated. What is between them stays in cache."""
    return _run(x, w, bias, KINDS[kind], False)


def linear_gated_amx(x: Tensor, w: PackedWeight, kind: GateKind, bias: Tensor | None = None) -> Tensor:
    """The same of `linear_amx`."""
    return _run(x, w, bias, KINDS[kind], True)


def _run(x: Tensor, w: PackedWeight, bias: Tensor | None, gate: int, tiles: bool) -> Tensor:
    n, k = w.out_features, w.in_features
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    known = facts(w)
    if known[0] in PLAIN:
        y: Tensor = _linear(rows, w["packed"], bias, n, k, gate, tiles)
    else:
        y = _coded(rows, *operands(w), bias, known, gate, tiles)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
