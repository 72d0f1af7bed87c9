"""Mixture of experts: choosing, sorting rows by expert, products by group, and putting results together."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_npu_emulation.contract import FLOATS, HALVES, emulated, require, require_dtype
from sglang_npu_emulation.quantised import CODES, codes

INNER = 65536
DTYPES_OF_BIAS = {torch.float16: torch.float16, torch.bfloat16: torch.float32, torch.float32: torch.float32}


@emulated("npu_moe_gating_top_k")
def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    require_dtype(FLOATS, x=x)
    require(x.dim() == 2 and x.shape[1] <= 2048, f"x is [T, X] with up to 2048 experts, not {list(x.shape)}")
    require(input_ids is None and tid2eid is None, "choice by a table of tokens is not emulated")
    require(renorm == 0 and norm_type in (0, 1) and group_select_mode in (0, 1), "renorm 0, norm_type 0 or 1")
    require(bias is None or (bias.dtype == x.dtype and bias.shape == x.shape[1:]), "bias: [X], of the dtype of x")
    experts = x.shape[1]
    require(group_count > 0 and experts % group_count == 0, f"{experts} experts in {group_count} groups")
    size = experts // group_count
    require(size > 2 and -(-size // 32) * 32 * group_count <= 2048, f"groups of more than 2 experts, not {size}")
    require(1 <= k_group <= group_count and 1 <= k <= size * k_group, f"{k} of {k_group} groups of {size}")
    norm = x.float().sigmoid() if norm_type else x.float().softmax(-1)
    choice = norm if bias is None else norm + bias.float()
    if group_count > 1:
        groups = choice.view(-1, group_count, size)
        score = groups.topk(2, dim=-1).values.sum(-1) if group_select_mode else groups.amax(-1)
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, _best(score, k_group), True)
        choice = groups.masked_fill(~chosen[..., None], -torch.inf).flatten(1)
    ids = _best(choice, k)
    y = norm.gather(1, ids)
    y = y / (y.sum(-1, keepdim=True) + eps) * routed_scaling_factor
    return y.to(x.dtype), ids.int(), norm


@emulated("npu_moe_gating_top_k_softmax_v2")
def gating_top_k_softmax(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    require_dtype(FLOATS, x=x)
    require(x.dim() in (2, 3) and 0 < k <= min(x.shape[-1], 1024), f"k is at most X and 1024, not {k}")
    require(
        finished is None and not output_softmax and renorm in (0, 1),
        "finished rows and output_softmax are not emulated",
    )
    scores = x.float() if renorm else x.float().softmax(-1)
    ids = _best(scores, k)
    y = scores.gather(-1, ids)
    return (y.softmax(-1) if renorm else y).to(x.dtype), ids.int(), x.new_empty(0, dtype=torch.float32)


def _best(scores: Tensor, k: int) -> Tensor:
    """Of equals the lower index: the vendor says nothing of them."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


@emulated("npu_moe_init_routing_v2")
def init_routing(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | None = None,
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_dtype(FLOATS, x=x)
    require(expert_idx.dtype == torch.int32 and x.dim() == expert_idx.dim() == 2, "x: [T, M], expert_idx: int32[T, K]")
    require(len(x) == len(expert_idx), "a row of expert_idx for each of x")
    require(0 < expert_num <= 10240 and active_expert_range == [0, expert_num], "a part of the experts is not emulated")
    require(
        drop_pad_mode == 0 and quant_mode == -1 and scale is None and offset is None, "drop_pad_mode 0; no quantisation"
    )
    require(
        expert_tokens_num_type == 1 and expert_tokens_num_flag,
        "expert_tokens_num_type 1 or 2, with its flag; 2 is not emulated",
    )
    require(row_idx_type == 0 and x_dtype is None, "row_idx_type 1 is not emulated")
    require(active_num in (-1, 0, expert_idx.numel()), "dropping rows is not emulated")
    ids, k = expert_idx.flatten().long(), expert_idx.shape[1]
    require(bool((ids >= 0).all() and (ids < expert_num).all()), f"experts are 0 to {expert_num - 1}")
    order = torch.sort(ids, stable=True).indices
    place = torch.empty_like(order).index_put_((order,), torch.arange(len(order)))
    counts = torch.bincount(ids, minlength=expert_num)
    return x[order // k], place.int(), counts, torch.full((len(order),), torch.nan)


@emulated("npu_grouped_matmul")
def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **others: object,
) -> list[Tensor]:
    """One tensor of rows, one stack of matrices, one tensor of results: float, int8 with a scale for each channel and token, or float by codes of 4 bits."""
    require(not others, f"{', '.join(others)}: not emulated")
    require(len(x) == len(weight) == 1 and split_item in (2, 3) and group_type == 0, "one x, one stack, one result")
    rows, stack = x[0], weight[0]
    if stack.dtype == torch.int32:
        stack = _numbers(stack, antiquant_scale, antiquant_offset, rows.dtype)
    else:
        require(antiquant_scale is None and antiquant_offset is None, "antiquant scales are of codes")
    require(
        rows.dtype == stack.dtype and rows.dim() == 2 and stack.dim() == 3, "x: [S, K], weight: [X, K, N], of one dtype"
    )
    require(rows.is_contiguous(), "x may not be transposed")
    require(stack.is_contiguous() or stack.mT.is_contiguous(), "weight is dense, or the transposition of a dense one")
    require(rows.shape[1] == stack.shape[1], f"{list(rows.shape)} by {list(stack.shape)}")
    last = stack.shape[2] if stack.is_contiguous() else stack.shape[1]
    require(rows.shape[1] < INNER and last < INNER, f"last dims below {INNER}")
    require(
        group_list is not None and group_list.dtype == torch.int64 and group_list_type == 1, "group_list: int64 counts"
    )
    assert group_list is not None
    require(2 <= len(group_list) <= 1024 and len(group_list) == len(stack), f"2 to 1024 groups, not {len(group_list)}")
    counts = group_list.tolist()
    require(min(counts) >= 0 and sum(counts) == len(rows), f"counts sum to {len(rows)} rows, not to {sum(counts)}")
    if rows.dtype == torch.int8:
        require(bias is None, "a bias of int8 products is int32, and is not emulated")
        factors, dtype = _scales(scale, per_token_scale, output_dtype, rows, stack)
    else:
        require_dtype(FLOATS, x=rows)
        require(scale is None and per_token_scale is None and output_dtype is None, "scales are of int8")
        factors, dtype = None, rows.dtype
    if bias is not None:
        require(len(bias) == 1 and bias[0].shape == (len(stack), stack.shape[2]), "bias: [X, N]")
        require(bias[0].dtype == DTYPES_OF_BIAS[rows.dtype], f"bias of {rows.dtype} is of {DTYPES_OF_BIAS[rows.dtype]}")
    made = []
    for i, part in enumerate(rows.split(counts)):
        exact = torch.float64 if factors else torch.float32
        y = (part.to(exact) @ stack[i].to(exact)).float()
        if factors:
            y = y * factors[0][i] * factors[1].split(counts)[i][:, None]
        made.append((y if bias is None else y + bias[0][i].float()).to(dtype))
    return [torch.cat(made)]


def _numbers(stack: Tensor, scale: list[Tensor] | None, offset: list[Tensor] | None, dtype: torch.dtype) -> Tensor:
    """int32[X, K, N / 8] of codes, as npu_convert_weight_to_int4pack lays them -> [X, K, N] of what they stand for, rounded to the dtype of x."""
    require_dtype(HALVES, x=torch.empty(0, dtype=dtype))
    require(stack.dim() == 3 and stack.is_contiguous(), "weight: int32[X, K, N / 8], dense")
    require(scale is not None and offset is not None and len(scale) == len(offset) == 1, "codes: a scale and an offset")
    assert scale is not None and offset is not None
    experts, inner, columns = stack.shape[0], stack.shape[1], stack.shape[2] * CODES
    shape = scale[0].shape
    require(
        (len(shape) == 2 or (len(shape) == 3 and shape[1] > 1)) and (shape[0], shape[-1]) == (experts, columns),
        f"scales [{experts}, {columns}], or [{experts}, G, {columns}], not {list(shape)}",
    )
    require(scale[0].dtype == offset[0].dtype == dtype, f"scales and offsets are of {dtype}")
    require(offset[0].shape == shape, "offsets are like scales")
    groups = shape[1] if len(shape) == 3 else 1
    require(inner % groups == 0, f"{groups} groups of {inner} rows")
    by_row = [s.view(experts, groups, columns).float().repeat_interleave(inner // groups, 1) for s in (*scale, *offset)]
    return ((codes(stack) + by_row[1]) * by_row[0]).to(dtype)


def _scales(
    scale: list[Tensor] | None, per_token: list[Tensor] | None, output_dtype: int | None, rows: Tensor, stack: Tensor
) -> tuple[tuple[Tensor, Tensor], torch.dtype]:
    """float32[X, N], float32[S], and the dtype of the results. What a scale may be goes with that."""
    require(scale is not None and per_token is not None and len(scale) == len(per_token) == 1, "int8: both scales")
    assert scale is not None and per_token is not None
    dtype = {5: torch.float16, 15: torch.bfloat16}.get(output_dtype or 1)
    require(dtype is not None, f"output_dtype {output_dtype} is not emulated")
    assert dtype is not None
    wanted = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    require(scale[0].dtype == wanted and scale[0].shape == (len(stack), stack.shape[2]), f"scale: {wanted}[X, N]")
    require(per_token[0].dtype == torch.float32 and per_token[0].shape == (len(rows),), "per_token_scale: float32[S]")
    return (scale[0].float(), per_token[0]), dtype


@emulated("npu_moe_finalize_routing")
def finalize_routing(
    rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    place: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    require_dtype(FLOATS, expanded_permuted_rows=rows)
    require(
        skip1 is None and skip2 is None and bias is None and export_for_source_row is None,
        "skips and biases are not emulated",
    )
    require(drop_pad_mode == 0 and scales is not None, "drop_pad_mode 0, with scales")
    assert scales is not None
    require(
        scales.dtype == rows.dtype and scales.dim() == 2,
        f"scales: {rows.dtype}[T, K], not {scales.dtype}{list(scales.shape)}",
    )
    require(
        place.dtype == torch.int32 and place.shape == (len(rows),) and scales.numel() == len(rows),
        "int32[T * K] of rows",
    )
    require(bool((place >= 0).all() and (place < len(rows)).all()), "rows are those of expanded_permuted_rows")
    chosen = rows[place.view(scales.shape[1], -1).t()]  # choice by choice
    return (chosen.float() * scales.float()[..., None]).sum(1).to(rows.dtype)
