"""lora.experts: `moe.fused` with adapters on both products of each expert.

The rows of one adapter and expert are a group like those of one expert, so the same kernel multiplies both: rows are sorted once by
expert and once by the pair. Sums and scales between products are PyTorch's own, an elementwise launch each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_core.api.ops import ExpertAdapters, ExpertSpec, PackedWeight
from sglang_triton.activation import gated_rows
from sglang_triton.grouping import by_group
from sglang_triton.moe import AOT as MOE_AOT
from sglang_triton.moe import by_expert, by_expert_invariant, combined, fused


def experts(
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    weights: Tensor,
    ids: Tensor,
    act: ExpertSpec,
    adapters: ExpertAdapters,
    token_adapter: Tensor | None,
    *,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    expert_map: Tensor | None = None,
    multiply: Callable[..., Tensor] = by_expert,
) -> Tensor:
    """x: [T, M], w13: [X, 2F, M], w2: [X, M, F], weights: float32[T, K], ids, token_adapter: int32 -> [T, M]."""
    if token_adapter is None:
        return fused(
            x, w13, w2, weights, ids, act, bias13=bias13, bias2=bias2, expert_map=expert_map, multiply=multiply
        )
    (num_adapters, num_experts), top_k = adapters.a13.shape[:2], ids.shape[1]
    local = ids.flatten() if expert_map is None else expert_map[ids.flatten()]
    own = token_adapter.repeat_interleave(top_k)
    none = num_adapters * num_experts
    pair = torch.where((own >= 0) & (local >= 0), own * num_experts + local, none)
    order, sizes = by_group(local, num_experts)
    pairs = by_group(pair, none)
    share = top_k
    if act.weight_on_input:
        x, share = (x.float()[:, None] * weights[..., None]).to(x.dtype).flatten(0, 1), 1
    # Rows of what is remote keep zeros: no group has them, and each is added with a weight.
    h = x.new_zeros(local.shape[0], w13.out_features)
    multiply(x, w13, sizes, bias13, h, source=order, share=share, target=order)
    half = adapters.b13.shape[2] // 2
    halves = (adapters.b13[:, :, :half], adapters.b13[:, :, half:])
    h = _added(h, x, share, adapters.a13, halves, adapters.scale[..., :2], pair, pairs, multiply)
    h = gated_rows(h, act)
    y = x.new_zeros(local.shape[0], w2.out_features)
    multiply(h, w2, sizes, bias2, y, source=order, target=order)
    y = _added(y, h, 1, adapters.a2, (adapters.b2,), adapters.scale[..., 2:], pair, pairs, multiply)
    return combined(y, weights, weighted=not act.weight_on_input)


def experts_invariant(*args: Any, **more: Any) -> Tensor:
    """As `experts`, in the same tiles whatever the batch."""
    return experts(*args, **more, multiply=by_expert_invariant)


def _added(
    y: Tensor,
    x: Tensor,
    share: int,
    a: Tensor,
    b: tuple[Tensor, ...],
    scale: Tensor,
    pair: Tensor,
    pairs: tuple[Tensor, Tensor],
    multiply: Callable[..., Tensor],
) -> Tensor:
    """y: [S, out], row i of x: i // share, a: [A, X, P * R, in], b: P times [A, X, out / P, R], scale: [A, X, P] -> [S, out]."""
    order, sizes = pairs
    count, num = y.shape[0], a.shape[0] * a.shape[1]
    low = y.new_zeros(count, a.shape[2])
    multiply(x, _stack(a), sizes, None, low, source=order, share=share, target=order)
    by_pair = scale.flatten(0, 1)[pair.clamp(max=num - 1)]
    low = (low.view(count, len(b), b[0].shape[3]).float() * by_pair[..., None]).to(y.dtype)
    delta = []
    for part, matrices in enumerate(b):
        made = y.new_zeros(count, matrices.shape[2])
        delta.append(multiply(low[:, part], _stack(matrices), sizes, None, made, source=order, target=order))
    return torch.where(pair[:, None] < num, (y.float() + torch.cat(delta, dim=-1).float()).to(y.dtype), y)


def _stack(matrices: Tensor) -> PackedWeight:
    """matrices: [A, X, out, in] -> a stack of A * X experts, without a copy."""
    flat = matrices.flatten(0, 1)
    return PackedWeight(
        "dense", {"weight": flat}, out_features=flat.shape[1], in_features=flat.shape[2], num_experts=flat.shape[0]
    )


_OF_MOE = next(spec for spec in MOE_AOT if spec.op == "moe.fused")
AOT = (
    replace(
        _OF_MOE,
        op="lora.experts",
        tuned_as="moe.fused",
        name="8 adapters of 128 experts",
        constexprs=_OF_MOE.constexprs | {"X": 1024, "BLOCK_X": 1024, "HAS_TARGET": True},
    ),
)
