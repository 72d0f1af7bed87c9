"""Gated activations: the middle of a gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from sglang_core.ops.codes import CodeKind, Codes, coded
from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide

GateKind = Literal["silu", "gelu", "gelu_tanh"]


@op("act.gated")
def gated(x: Tensor, kind: GateKind) -> Tensor:
    """x: [T, 2F], gate then up -> act(gate) * up: [T, F]. float32 inside, one rounding to x.dtype at the end.

    "silu" is z sigmoid(z); "gelu" has the error function, "gelu_tanh" its approximation by tanh.
    """
    gate, up = wide(x).chunk(2, dim=-1)
    return (_activate(gate, kind) * up).to(x.dtype)


@op("act.gated_quant", composite={"act": "act.gated"})
def gated_quant(
    x: Tensor, kind: GateKind, codes: CodeKind, *, act: Callable[[Tensor, GateKind], Tensor] = gated
) -> Codes:
    """x: [T, 2F], gate then up -> codes of act(gate) * up: [T, F], as it was rounded to x.dtype."""
    return coded(act(x, kind), codes)


def _activate(x: Tensor, kind: GateKind) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    assert kind in ("gelu", "gelu_tanh"), f"unknown activation {kind!r}"
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
