"""moe.fused in fp8.block128 by DeepGEMM's grouped product over a contiguous layout. Importing this imports it.

Rows lie by expert, and each expert begins a block of `BLOCK` rows, all of one expert: `m_indices` says of which, row by row. How many blocks an
expert needs is known on the device alone, so there are as many as there can be, and nothing waits for the device. Rows that pad a block are row 0
of x, and blocks that are too many belong to the last expert: they cost a product whose result nobody reads. Marked -1, as the interface has it,
they would be skipped by some builds of the release; others read the weight's scales at -1.
"""

from __future__ import annotations

import deep_gemm
import torch
from sglang_triton import moe
from sglang_triton.activation import gated_rows
from sglang_triton.grouping import by_group
from sglang_triton.quantize import quantise
from sglang_triton.rows import as_rows
from torch import Tensor

from sglang_core.api.ops import ExpertSpec, PackedWeight

BLOCK = 128  # what get_m_alignment_for_contiguous_layout() gives in every build of the release


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
    """x: bfloat16[T, M], w13: [X, 2F, M], w2: [X, M, F], weights: float32[T, K], ids: int32[T, K] -> bfloat16[T, M]. Biases join rounded products."""
    if expert_map is not None:
        # Rows of experts that other ranks hold would be multiplied too: Triton leaves them out.
        return moe.fused(x, w13, w2, weights, ids, act, bias13=bias13, bias2=bias2, expert_map=expert_map)
    if not ids.numel():
        return x.new_empty(x.shape)
    share = ids.shape[1]
    if act.weight_on_input:
        x, share = (x.float()[:, None] * weights[..., None]).to(x.dtype).flatten(0, 1), 1
    place, expert = layout(ids.flatten(), w13.num_experts or 0)
    row = torch.arange(place.shape[0], device=x.device) // share
    source = torch.zeros(expert.shape[0], dtype=torch.int64, device=x.device).scatter_(0, place, row)
    code, scale = quantise(as_rows(x), "fp8_block")
    h = gated_rows(_product(code[source], scale[source], w13, expert, bias13), act)
    y = _product(*quantise(h, "fp8_block"), w2, expert, bias2)
    return moe.combined(y[place], weights, weighted=not act.weight_on_input)


def layout(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """group: int32[S] -> the place of each row: int64[S]; the group of each of P places: int32[P].

    P is a multiple of BLOCK that is enough whatever the groups.
    """
    order, sizes = by_group(group, num_groups)
    num_rows = group.shape[0]
    num_blocks = (num_rows + min(num_rows, num_groups) * (BLOCK - 1)) // BLOCK
    blocks = (sizes + BLOCK - 1) // BLOCK
    last_block = blocks.cumsum(0)
    # Where a group's first row goes, less where it is among the sorted rows.
    shift = (last_block - blocks) * BLOCK - (sizes.cumsum(0) - sizes)
    place = torch.arange(num_rows, device=group.device) + shift[group[order]]
    block = torch.arange(num_blocks, device=group.device)
    owner = torch.searchsorted(last_block, block, right=True).clamp(max=num_groups - 1).int()
    return torch.empty_like(place).scatter_(0, order.long(), place), owner[:, None].expand(-1, BLOCK).flatten()


def _product(code: Tensor, scale: Tensor, w: PackedWeight, expert: Tensor, bias: Tensor | None) -> Tensor:
    """code: uint8[P, in] of e4m3fn, scale: float32[P, in / 128], w: [X, out, in], expert: int32[P] -> bfloat16[P, out]."""
    y = torch.empty(code.shape[0], w.out_features, dtype=torch.bfloat16, device=code.device)
    rows = code.view(torch.float8_e4m3fn), scale
    deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(rows, (w["weight"], w["scale"]), y, expert)
    return y if bias is None else y.add_(bias[expert])
