"""A backend whose kernels pack: every tensor as its bytes, inverted, and its dtype and shape. Exact, and of no use otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import KernelContext
from sglang_core.backend.kernel import Kernel
from sglang_core.ops.gemm import linear as linear_body
from sglang_core.ops.moe import fused as fused_body
from sglang_core.ops.weight import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn)
packed: list[str] = []  # the format of each weight that was packed


class Scrambled(CpuBackend):
    name = "scrambled"

    def __init__(self, packed_layout: str = "scrambled/1") -> None:
        self.packed_layout = packed_layout

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        facts: dict[str, Any] = {"device": ("cpu",), "packed_layout": self.packed_layout}
        facts |= {"pack": f"{__name__}:pack", "unpack": f"{__name__}:unpack"}
        return [
            Kernel("gemm.linear", fn=f"{__name__}:linear", **facts),
            Kernel("moe.fused", fn=f"{__name__}:fused", **facts),
        ]


def pack(w: PackedWeight) -> PackedWeight:
    packed.append(w.fmt)
    tensors = {}
    for name, x in w.named_buffers():
        tensors[f"{name}_bytes"] = ~x.reshape(-1).view(torch.uint8)
        tensors[f"{name}_facts"] = torch.tensor([DTYPES.index(x.dtype), *x.shape])
    return _like(w, tensors, "scrambled")


def unpack(w: PackedWeight) -> PackedWeight:
    tensors = {}
    for name in (name.removesuffix("_facts") for name, _ in w.named_buffers() if name.endswith("_facts")):
        dtype, *shape = w[f"{name}_facts"].tolist()
        tensors[name] = (~w[f"{name}_bytes"]).view(DTYPES[dtype]).view(shape)
    return _like(w, tensors, "canonical")


def _like(w: PackedWeight, tensors: dict[str, Tensor], layout: str) -> PackedWeight:
    return PackedWeight(
        w.fmt,
        tensors,
        out_features=w.out_features,
        in_features=w.in_features,
        num_experts=w.num_experts,
        layout=layout,
    )


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return linear_body(x, unpack(w), bias)


def fused(x: Tensor, w13: PackedWeight, w2: PackedWeight, *args: Any, **kwargs: Any) -> Tensor:
    return fused_body(x, unpack(w13), unpack(w2), *args, **kwargs)
