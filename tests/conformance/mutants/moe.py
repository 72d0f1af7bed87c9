"""Mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_core.ops.gemm import dense
from sglang_core.ops.moe import RouteSpec, _in_top_groups
from sglang_core.ops.weight import PackedWeight
from tests.conformance.mutants.bodies import Mutant, body


def _route(logits: Tensor, spec: RouteSpec, bias: Tensor | None, **changes: Any) -> Any:
    return body("moe.route", logits, replace(spec, **changes), bias)


def weights_with_the_bias(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    weights, ids = _route(logits, spec, bias)
    return (weights if bias is None else weights + bias[ids] * spec.scale), ids


def forgets_groups(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, num_groups=1, top_groups=1)


def scores_groups_by_their_best(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, group_score="max")


def forgets_to_renormalize(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, renormalize=False)


def scales_before_renormalizing(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, scale=1.0 if spec.renormalize else spec.scale)


def softmax_before_top_k(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, scoring="sigmoid" if spec.scoring == "sigmoid" else "softmax")


def masks_groups_with_zero(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    """As if experts of the other groups had the score zero, which beats one below zero."""
    weights, ids = _route(logits, spec, bias)
    if bias is None or spec.num_groups == 1:
        return weights, ids
    choice = logits.float().sigmoid() + bias
    masked = torch.where(_in_top_groups(choice, spec), choice, 0.0)
    return weights, torch.sort(masked, descending=True, stable=True).indices[:, : spec.top_k].int()


def takes_the_highest_id_of_equals(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    weights, ids = _route(logits.flip(-1), spec, None if bias is None else bias.flip(-1))
    return weights, spec.num_experts - 1 - ids


def groups_one_row_late(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    later = group_sizes.clone()
    later[0] += 1
    return body("gemm.grouped", x, w, later, bias)  # type: ignore[no-any-return]


def grouped_forgets_bias(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    return body("gemm.grouped", x, w, group_sizes)  # type: ignore[no-any-return]


def gives_rows_of_no_group_to_the_last(
    x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None
) -> Tensor:
    sizes = group_sizes.clone()
    sizes[-1] += x.shape[0] - sizes.sum()
    return body("gemm.grouped", x, w, sizes, bias)  # type: ignore[no-any-return]


def weights_in_half(*args: Any, **kwargs: Any) -> Tensor:
    x, w13, w2, weights, ids, act = args
    return body("moe.fused", x, w13, w2, weights.bfloat16(), ids, act, **kwargs)  # type: ignore[no-any-return]


def sums_experts_in_the_dtype(*args: Any, **kwargs: Any) -> Tensor:
    x, w13, w2, weights, ids, act = args
    parts = [
        body("moe.fused", x, w13, w2, weights[:, i : i + 1], ids[:, i : i + 1], act, **kwargs)
        for i in range(ids.shape[1])
    ]
    total = parts[0].bfloat16()
    for part in parts[1:]:
        total = total + part.bfloat16()
    return total.to(x.dtype)


def ignores_the_map(*args: Any, expert_map: Tensor | None = None, **kwargs: Any) -> Tensor:
    x, w13, w2, weights, ids, act = args
    return body("moe.fused", x, w13, w2, weights, ids % w13.num_experts, act, **kwargs)  # type: ignore[no-any-return]


def remote_is_expert_zero(*args: Any, expert_map: Tensor | None = None, **kwargs: Any) -> Tensor:
    clamped = None if expert_map is None else expert_map.clamp(min=0)
    return body("moe.fused", *args, expert_map=clamped, **kwargs)  # type: ignore[no-any-return]


def weight_on_the_other_side(*args: Any, **kwargs: Any) -> Tensor:
    act = replace(args[5], weight_on_input=not args[5].weight_on_input)
    return body("moe.fused", *args[:5], act, **kwargs)  # type: ignore[no-any-return]


def up_then_gate(*args: Any, **kwargs: Any) -> Tensor:
    w13 = args[1]
    flipped = dense(torch.cat(w13["weight"].chunk(2, 1)[::-1], 1))
    if (bias := kwargs.get("bias13")) is not None:
        kwargs["bias13"] = torch.cat(bias.chunk(2, 1)[::-1], 1)
    return body("moe.fused", args[0], flipped, *args[2:], **kwargs)  # type: ignore[no-any-return]


def forgets_the_second_bias(*args: Any, **kwargs: Any) -> Tensor:
    return body("moe.fused", *args, **(kwargs | {"bias2": None}))  # type: ignore[no-any-return]


def forgets_alpha(*args: Any, **kwargs: Any) -> Tensor:
    return body("moe.fused", *args[:5], replace(args[5], alpha=1.702), **kwargs)  # type: ignore[no-any-return]


def forgets_the_limit(*args: Any, **kwargs: Any) -> Tensor:
    return body("moe.fused", *args[:5], replace(args[5], limit=7.0), **kwargs)  # type: ignore[no-any-return]


def drops_what_is_past_capacity(*args: Any, **kwargs: Any) -> Tensor:
    """An expert takes 64 tokens of a step and no more."""
    x, w13, w2, weights, ids, act = args
    kept = torch.ones_like(weights, dtype=torch.bool)
    for expert in range(int(ids.max()) + 1 if ids.numel() else 0):
        mine = ids == expert
        kept &= ~(mine & (mine.flatten().cumsum(0).view(mine.shape) > 64))
    return body("moe.fused", x, w13, w2, weights * kept, ids, act, **kwargs)  # type: ignore[no-any-return]


def routes_without_max(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    """A softmax of exponentials as they are."""
    weights, ids = _route(logits, spec, bias)
    if spec.scoring != "softmax" or spec.num_groups > 1:
        return weights, ids
    p = logits.float().exp()
    p = (p / p.sum(-1, keepdim=True)).gather(1, ids.long())
    return (p / p.sum(-1, keepdim=True) if spec.renormalize else p) * spec.scale, ids


MUTANTS = {
    "weights_with_the_bias": Mutant("moe.route"),
    "forgets_groups": Mutant("moe.route"),
    "scores_groups_by_their_best": Mutant("moe.route"),
    "forgets_to_renormalize": Mutant("moe.route"),
    "scales_before_renormalizing": Mutant("moe.route"),
    "softmax_before_top_k": Mutant("moe.route"),
    "masks_groups_with_zero": Mutant("moe.route"),
    "takes_the_highest_id_of_equals": Mutant("moe.route"),
    "groups_one_row_late": Mutant("gemm.grouped"),
    "grouped_forgets_bias": Mutant("gemm.grouped"),
    "gives_rows_of_no_group_to_the_last": Mutant("gemm.grouped"),
    "weights_in_half": Mutant("moe.fused"),
    "sums_experts_in_the_dtype": Mutant("moe.fused"),
    "ignores_the_map": Mutant("moe.fused"),
    "remote_is_expert_zero": Mutant("moe.fused"),
    "weight_on_the_other_side": Mutant("moe.fused"),
    "up_then_gate": Mutant("moe.fused"),
    "forgets_the_second_bias": Mutant("moe.fused"),
    "forgets_alpha": Mutant("moe.fused"),
    "forgets_the_limit": Mutant("moe.fused"),
    "drops_what_is_past_capacity": Mutant("moe.fused", "every token to the same experts"),
    "routes_without_max": Mutant("moe.route", "logits about"),
}
