"""moe.route (csrc/route.inl); moe.fused (csrc/moe.inl) and gemm.grouped (csrc/grouped.inl) in every format, on stacks packed once."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sglang_core.api.ops import ExpertSpec, PackedWeight, RouteSpec
from sglang_xeon.activation import KINDS
from sglang_xeon.library import ops
from sglang_xeon.weights import LAYOUT, facts, pack, stack_operands, unpack

__all__ = ["LAYOUT", "fused", "fused_amx", "grouped", "grouped_amx", "pack", "route", "unpack"]

SCORINGS = {"softmax": 0, "sigmoid": 1, "softmax_after_top_k": 2}  # enum Scoring of csrc/isa.h

_route, _fused, _grouped = ops.route.default, ops.fused_experts.default, ops.grouped.default


def route(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits: [T, X], bias: float32[X] -> weights: float32[T, K], ids: int32[T, K]."""
    return _route(  # type: ignore[no-any-return]
        logits,
        bias,
        spec.top_k,
        SCORINGS[spec.scoring],
        spec.num_groups,
        spec.top_groups,
        spec.group_score == "top2_sum",
        spec.renormalize,
        spec.scale,
    )


def fused(
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    weights: Tensor,
    ids: Tensor,
    act: ExpertSpec,
    *,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    expert_map: Tensor | None = None,
    tiles: bool = False,
) -> Tensor:
    """x: [T, M], w13: [X, 2F, M], w2: [X, M, F], weights: float32[T, K], ids: int32[T, K] -> [T, M].

    Rounds where the op's body does; ids that are nobody's add nothing. `tiles`: see `fused_amx`.
    """
    clamped = act.activation == "swiglu_clamped"
    y: Tensor = _fused(
        x,
        *stack_operands(w13),
        bias13,
        facts(w13),
        *stack_operands(w2),
        bias2,
        facts(w2),
        weights,
        ids,
        expert_map,
        0 if clamped else KINDS[act.activation],
        clamped,
        act.alpha,
        act.limit,
        act.weight_on_input,
        tiles,
    )
    return y


def grouped(
    x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None, *, tiles: bool = False
) -> Tensor:
    """x: [S, in], w: [X, out, in], group_sizes: int32[X], bias: [X, out] -> [S, out]."""
    return _grouped(x, *stack_operands(w), bias, facts(w), group_sizes, tiles)  # type: ignore[no-any-return]


# With AMX tiles for experts that have rows enough: those sum in another order than with few rows.
fused_amx = partial(fused, tiles=True)
grouped_amx = partial(grouped, tiles=True)
