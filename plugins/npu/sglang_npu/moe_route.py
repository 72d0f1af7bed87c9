"""moe.route: experts chosen by npu_moe_gating_top_k or npu_moe_gating_top_k_softmax_v2, weights by PyTorch's operators.

Releases of CANN differ in whether the gating op divides its weights by their sum; which experts it chooses is the same in all.
"""

from __future__ import annotations

import torch_npu
from torch import Tensor

from sglang_core.api.ops import RouteSpec

TINY = 1e-20  # added to a sum of weights before dividing by it, as in the op's definition
SOFTMAX, SIGMOID = 0, 1  # norm_type
TOP_2_SUM = 1  # group_select_mode


def route(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits: [T, X], bias: float32[X] -> weights: float32[T, K], ids: int32[T, K], the best first."""
    logits = logits.float()
    if not logits.shape[0]:
        empty = logits.new_empty(0, spec.top_k)
        return empty, empty.int()
    if spec.scoring == "softmax_after_top_k":
        weights, ids, _ = torch_npu.npu_moe_gating_top_k_softmax_v2(logits, k=spec.top_k, renorm=1)
    else:
        _, ids, _ = torch_npu.npu_moe_gating_top_k(
            logits,
            spec.top_k,
            bias=None if bias is None else bias.float(),
            k_group=spec.top_groups,
            group_count=spec.num_groups,
            group_select_mode=TOP_2_SUM if spec.group_score == "top2_sum" else 0,
            norm_type=SIGMOID if spec.scoring == "sigmoid" else SOFTMAX,
        )
        scores = logits.sigmoid() if spec.scoring == "sigmoid" else logits.softmax(-1)
        weights = scores.gather(1, ids.long())
    if spec.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return weights * spec.scale, ids
