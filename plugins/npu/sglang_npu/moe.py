"""moe.fused and gemm.grouped by npu_moe_init_routing_v2, npu_grouped_matmul and npu_moe_finalize_routing, on dense weights and those of int8 and int4."""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

from sglang_core.api.ops import ExpertSpec, Fmt, PackedWeight
from sglang_npu import int4
from sglang_npu.activation import gated
from sglang_npu.linear import like, nd, packed

SINGLE = 2  # split_item: one tensor of results
BY_ROWS = 0  # group_type
COUNTS = 1  # group_list_type and expert_tokens_num_type: a number of rows for each expert
GATHER = 0  # row_idx_type: where each choice of a token went
LAYOUT = "npu.experts.nz"


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
    """x: [T, M], w13: [X, 2F, M], w2: [X, M, F] (packed: the other way round), weights: float32[T, K], ids: int32[T, K] -> [T, M].

    What another rank's expert would make counts for nothing: expert 0 makes it here, with weight 0, for every row must belong to a group.
    """
    if not x.shape[0]:
        return torch.empty_like(x)
    if expert_map is not None:
        ids = expert_map[ids]
        weights = torch.where(ids >= 0, weights, 0)
        ids = ids.clamp(min=0)
    num_experts = w13["weight"].shape[0]
    rows, place, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.contiguous(),
        ids.contiguous(),
        active_num=ids.numel(),
        expert_num=num_experts,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        active_expert_range=[0, num_experts],
        row_idx_type=GATHER,
    )
    if act.weight_on_input:
        by_row = torch.empty_like(weights.flatten()).index_put_((place,), weights.flatten())
        rows = (rows.float() * by_row[:, None]).to(x.dtype)
        weights = torch.ones_like(weights)
    h = activate(_product(rows, w13, counts, bias13), act)
    y = _product(h, w2, counts, bias2)
    # Choices are numbered by token in what was made above, and by choice in what is read here. Weights and sums: float32.
    by_choice = place.view(ids.shape).t().contiguous().view(-1)
    made: Tensor = torch_npu.npu_moe_finalize_routing(y.float(), None, None, None, weights, by_choice, None)
    return made.to(x.dtype)


def grouped(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [S, in], w: [X, out, in], group_sizes: int32[X], bias: [X, out] -> [S, out]. Rows past the last group give zeros.

    Every row must belong to a group: those past the last join it, and what they get is not kept.
    """
    if not x.shape[0]:
        return x.new_empty(0, w.out_features)
    ends = group_sizes.cumsum(0)
    total = ends[-1:].clone()
    ends[-1:] = x.shape[0]
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    return torch.where((row < total)[:, None], _product(x, w, counts, bias), 0)


def _product(x: Tensor, w: PackedWeight, counts: Tensor, bias: Tensor | None) -> Tensor:
    """x: [S, in], w: [X, out, in], counts: int64[X], which sum to S, bias: [X, out] -> [S, out] in x.dtype."""
    groups: dict[str, Any] = {
        "group_list": counts.long(),
        "split_item": SINGLE,
        "group_type": BY_ROWS,
        "group_list_type": COUNTS,
    }
    if w.fmt.startswith("int8"):
        y = _int8(x.contiguous(), w, groups)
        return y if bias is None else y + bias.to(x.dtype).repeat_interleave(counts, dim=0, output_size=y.shape[0])
    if bias is not None:  # float16 alone takes its own
        groups["bias"] = [bias.to(torch.float16 if x.dtype == torch.float16 else torch.float32)]
    if w.fmt != "dense":
        groups |= _int4_scales(w, x.dtype)
        if bias is not None:
            groups["bias"] = [int4.filled(groups["bias"][0])]
    weight = w["weight"].transpose(1, 2) if w.layout == "canonical" else w["weight"]
    made: Tensor = torch_npu.npu_grouped_matmul([x.contiguous()], [weight], **groups)[0]
    return made[:, : w.out_features]


def _int4_scales(w: PackedWeight, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """What codes are made numbers with, in the activations' dtype, as documented. One group is a channel's own scale, with no dim for groups."""
    scale = w["scale"].to(dtype)
    offset = w["offset"].to(dtype) if Fmt.parse(w.fmt).has_zero else torch.zeros_like(scale)
    by_channel = scale.shape[1] == 1
    return {
        "antiquant_scale": [scale[:, 0] if by_channel else scale],
        "antiquant_offset": [offset[:, 0] if by_channel else offset],
    }


def _int8(x: Tensor, w: PackedWeight, groups: dict[str, Any]) -> Tensor:
    code, by_row = torch_npu.npu_dynamic_quant(x)
    # What each may be, as documented.
    scale = w["scale"].to(torch.bfloat16) if x.dtype == torch.bfloat16 else w["scale"]
    scales = {"scale": [scale], "per_token_scale": [by_row], "output_dtype": x.dtype}
    made: Tensor = torch_npu.npu_grouped_matmul([code], [w["weight"]], **scales, **groups)[0]
    return made


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """[X, in, out] in FRACTAL_NZ, scales as they are."""
    return packed(w, dict(w.named_buffers()) | {"weight": w["weight"].mT}, LAYOUT, out)


def unpack(w: PackedWeight) -> PackedWeight:
    kept = {name: tensor.clone() for name, tensor in w.named_buffers() if name != "weight"}
    return like(w, {"weight": nd(w["weight"]).mT.contiguous(), **kept})


def activate(x: Tensor, act: ExpertSpec) -> Tensor:
    """x: [S, 2F], gate then up -> [S, F], rounded once to x.dtype."""
    if act.activation != "swiglu_clamped":
        return gated(x, act.activation)
    gate, up = x.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
    return (gate * torch.sigmoid(act.alpha * gate) * (up + 1)).to(x.dtype)
