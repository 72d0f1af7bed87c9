"""A vendor's GEMM that keeps its weights transposed, and notes what it packed."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.ops.weight import PackedWeight

packed: list[tuple[int, int]] = []


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    packed.append((w.out_features, w.in_features))
    tensors = {"t": w["weight"].t().contiguous()}
    return PackedWeight(w.fmt, tensors, out_features=w.out_features, in_features=w.in_features, layout="transposed")


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    assert w.layout == "transposed"
    y = torch.matmul(x, w["t"])
    return y if bias is None else y + bias
