"""moe.route (csrc/route.inl); moe.fused and gemm.grouped: each expert packed as gemm.py has it, one after the other (csrc/moe.inl)."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api.ops import ExpertSpec, PackedWeight, RouteSpec
from sglang_xeon.activation import KINDS
from sglang_xeon.library import ops

LAYOUT = "xeon.experts"

SCORINGS = {"softmax": 0, "sigmoid": 1, "softmax_after_top_k": 2}  # enum Scoring of csrc/isa.h

_route, _fused, _grouped = ops.route.default, ops.fused_experts.default, ops.grouped.default
_pack, _pack_into, _unpack = ops.pack_experts.default, ops.pack_experts_into.default, ops.unpack_experts.default


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
) -> Tensor:
    """x: [T, M], w13: [X, 2F, M], w2: [X, M, F], weights: float32[T, K], ids: int32[T, K] -> [T, M].

    Rounds where the op's body does; ids that are nobody's add nothing.
    """
    clamped = act.activation == "swiglu_clamped"
    y: Tensor = _fused(
        x,
        w13["packed"],
        w2["packed"],
        weights,
        ids,
        w2.in_features,
        bias13,
        bias2,
        expert_map,
        0 if clamped else KINDS[act.activation],
        clamped,
        act.alpha,
        act.limit,
        act.weight_on_input,
    )
    return y


def grouped(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [S, in], w: [X, out, in], group_sizes: int32[X], bias: [X, out] -> [S, out]."""
    return _grouped(x, w["packed"], group_sizes, bias, w.out_features)  # type: ignore[no-any-return]


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """[X, out, in] -> X matrices in panels. With `out`, an earlier result, its bytes are rewritten."""
    if out is not None:
        _pack_into(w["weight"], out["packed"])
        return out
    return PackedWeight(
        w.fmt,
        {"packed": _pack(w["weight"])},
        out_features=w.out_features,
        in_features=w.in_features,
        num_experts=w.num_experts,
        layout=LAYOUT,
    )


def unpack(w: PackedWeight) -> PackedWeight:
    """The inverse of `pack`."""
    weight = _unpack(w["packed"], w.out_features, w.in_features)
    return PackedWeight(
        w.fmt, {"weight": weight}, out_features=w.out_features, in_features=w.in_features, num_experts=w.num_experts
    )
