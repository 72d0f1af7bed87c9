"""gemm.linear: PyTorch's product of dense weights in the NPU's own format, and npu_quant_matmul of int8 ones."""

from __future__ import annotations

import torch.nn.functional as F
import torch_npu
from torch import Tensor

from sglang_core.api.ops import PackedWeight

ND, FRACTAL_NZ = 2, 29  # of Ascend's tensor formats: row by row, and 16 x 16 (of bytes: 16 x 32) fractals in columns


def dense(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w: [out, in] -> [..., out]."""
    return F.linear(x, w["weight"], bias)


def pack_dense(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """[out, in] in FRACTAL_NZ, which the matrix unit reads without turning it round."""
    return packed(w, {"weight": w["weight"]}, "npu.nz", out)


def unpack_dense(w: PackedWeight) -> PackedWeight:
    return like(w, {"weight": nd(w["weight"])})


def int8(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w in int8.token_channel -> [..., out]: codes of each token, int32 sums, scales of tokens and channels, bias, one rounding."""
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], w.out_features)
    code, scale = torch_npu.npu_dynamic_quant(rows.contiguous())
    y: Tensor = torch_npu.npu_quant_matmul(
        code, w["weight"], w["scale"], pertoken_scale=scale, bias=bias, output_dtype=x.dtype
    )
    return y.view(*x.shape[:-1], w.out_features)


def pack_int8(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """[in, out] in FRACTAL_NZ, scales as they are."""
    return packed(w, {"weight": w["weight"].t().contiguous(), "scale": w["scale"]}, "npu.int8.nz", out)


def unpack_int8(w: PackedWeight) -> PackedWeight:
    return like(w, {"weight": nd(w["weight"]).t().contiguous(), "scale": w["scale"].clone()})


def packed(w: PackedWeight, tensors: dict[str, Tensor], layout: str, out: PackedWeight | None) -> PackedWeight:
    """`weight` among the tensors goes to FRACTAL_NZ. Into `out`, an earlier result, where it is given."""
    if out is not None:
        for name, tensor in tensors.items():
            out[name].copy_(tensor)  # in the format of what it is copied to
        return out
    made = {name: tensor.clone() for name, tensor in tensors.items() if name != "weight"}  # w keeps its own
    made["weight"] = torch_npu.npu_format_cast(tensors["weight"].contiguous(), FRACTAL_NZ)
    return like(w, made, layout)


def like(w: PackedWeight, tensors: dict[str, Tensor], layout: str = "canonical") -> PackedWeight:
    """A weight of w's format and sizes."""
    facts = {"out_features": w.out_features, "in_features": w.in_features}
    return PackedWeight(w.fmt, tensors, **facts, num_experts=w.num_experts, layout=layout)


def nd(x: Tensor) -> Tensor:
    plain: Tensor = torch_npu.npu_format_cast(x, ND)
    return plain
