"""Matrix products with packed weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sglang_core.ops.registry import op
from sglang_core.ops.weight import PackedWeight


def dense(weight: Tensor) -> PackedWeight:
    """weight: [out, in] -> the same in the "dense" format, its one tensor named `weight`."""
    return PackedWeight("dense", {"weight": weight}, out_features=weight.shape[0], in_features=weight.shape[1])


@op("gemm.linear", weighted=True)
def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w: [out, in], bias: [out] -> [..., out]. Sums in float32 or wider, adds the bias, rounds to x.dtype."""
    assert w.fmt == "dense" and w.layout == "canonical", f"no reference body for {w.fmt}/{w.layout}"
    return F.linear(x, w["weight"], bias)
