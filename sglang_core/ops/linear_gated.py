"""`gemm.linear_gated`: the first half of a gated MLP as one op."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sglang_core.ops.activation import GateKind, gated
from sglang_core.ops.gemm import linear as gemm_linear
from sglang_core.ops.registry import op
from sglang_core.ops.weight import PackedWeight


@op("gemm.linear_gated", weighted=True, composite={"linear": "gemm.linear", "act": "act.gated"})
def linear_gated(
    x: Tensor,
    w: PackedWeight,
    kind: GateKind,
    bias: Tensor | None = None,
    *,
    linear: Callable[[Tensor, PackedWeight, Tensor | None], Tensor] = gemm_linear,
    act: Callable[[Tensor, GateKind], Tensor] = gated,
) -> Tensor:
    """x: [..., in], w: [2F, in], gate then up, bias: [2F] -> act(gate) * up: [..., F]. The product is rounded to x.dtype, and so is the result.

    A kernel multiplies by w as `gemm.linear` of its provider packs it: both name one `pack` and one `packed_layout`.
    """
    return act(linear(x, w, bias), kind)
