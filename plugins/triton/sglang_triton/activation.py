"""act.gated."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api.ops import ExpertSpec, GateKind
from sglang_triton.aot_spec import WIDE, AotSpec
from sglang_triton.numerics import rounded, sigmoid, tanh, widen
from sglang_triton.rows import as_rows
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def gated(x: Tensor, kind: GateKind) -> Tensor:
    """x: [..., 2F], gate then up -> [..., F]."""
    return _launched(x, kind, 0.0, 0.0)


def gated_rows(x: Tensor, act: ExpertSpec) -> Tensor:
    """x: [S, 2F] -> [S, F]: what experts do between their two products."""
    return _launched(x, act.activation, act.alpha, act.limit)


def _launched(x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    if y.numel():
        rows = as_rows(x)
        config = choose("act.gated", F=width)
        grid = (triton.cdiv(rows.shape[0], config["BLOCK_T"]), triton.cdiv(width, config["BLOCK_F"]))
        _gated[grid](rows, y, rows.shape[0], width, rows.stride(0), alpha, limit, KIND=kind, **config)
    return y


@triton.jit
def _gated(x, y, T, F, stride, alpha, limit, KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """x: [T, 2F], rows `stride` apart; y: [T, F], dense. One program: BLOCK_T rows by BLOCK_F columns."""
    take_turn()
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    column = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    inside = (row < T) & (column < F)
    gate = widen(tl.load(x + row * stride + column, inside, other=0.0))
    up = widen(tl.load(x + row * stride + F + column, inside, other=0.0))
    if KIND == "swiglu_clamped":
        gate = tl.minimum(gate, limit)
        value = gate * sigmoid(alpha * gate) * (tl.minimum(tl.maximum(up, -limit), limit) + 1.0)
    else:
        value = activate(gate, KIND) * up
    tl.store(y + row * F + column, rounded(value, y.dtype.element_ty), inside)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """x: float32 -> act(x)."""
    if KIND == "silu":
        y = x * sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(KIND == "gelu_tanh", "an activation that act.gated does not know")
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return y


_SIGNATURE = {"x": "*bf16", "y": "*bf16", "T": "i32", "F": "i32", "stride": "i32", "alpha": "fp32", "limit": "fp32"}
AOT = tuple(
    AotSpec(
        op="act.gated",
        name=f"{kind}, F={width}",
        kernel=_gated,
        signature=_SIGNATURE,
        constexprs={"KIND": kind},
        sizes={"F": width},
        odd=("T",),
        instructions=WIDE,
    )
    for kind, width in (("silu", 512), ("silu", 4096), ("gelu", 4096), ("gelu_tanh", 4096), ("swiglu_clamped", 4096))
)
