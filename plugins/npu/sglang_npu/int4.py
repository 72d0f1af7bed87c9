"""Weights of 4 bits: gemm.linear by npu_weight_quant_batchmatmul, which multiplies what codes stand for, and how stacks of experts are packed.

How codes lie in an int32 is the vendor's affair: npu_convert_weight_to_int4pack puts them there, and a product with the identity takes them out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from sglang_core.api.ops import Fmt, PackedWeight
from sglang_npu.linear import like

ZERO = 8  # of the codes 0 to 15, what the vendor's -8 to 7 call 0
CODES = 8  # in an int32: so many rows of a weight, filled up with zeros
AT_ONCE = 1024  # rows of the identity


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w in int4.awq, int4.gptq or int4.pack -> [..., out]. The vendor's op rounds a scale to x.dtype, as it is called, and so do we."""
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], w.out_features)
    if bias is not None:  # bfloat16 wants it wider
        bias = filled(bias.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype))
    offset = w["offset"].to(x.dtype) if Fmt.parse(w.fmt).has_zero else None
    y = _product(rows.contiguous(), w, w["scale"].to(x.dtype), offset, bias)
    return y[:, : w.out_features].reshape(*x.shape[:-1], w.out_features)


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """weight: int32[in, out / 8], scale: float32[G, out], offset: int8[G, out] (out rounded up to whole int32), which is added to a code before it is scaled.
    Of a stack all have its experts before that."""
    byte = w["weight"]
    code = torch.stack([byte & 15, byte >> 4], dim=-1).flatten(-2)[..., : w.in_features]
    signed = filled(code.mT.to(torch.int32) - ZERO)
    packed = torch_npu.npu_convert_weight_to_int4pack(signed.flatten(0, -2)).view(*signed.shape[:-1], -1)
    made = {"weight": packed, "scale": filled(w["scale"].mT)}
    if Fmt.parse(w.fmt).has_zero:
        made["offset"] = filled((ZERO - w["zero"].mT.to(torch.int16)).to(torch.int8))
    if out is None:
        return like(w, made, "npu.int4")
    for name, tensor in made.items():
        out[name].copy_(tensor)
    return out


def unpack(w: PackedWeight) -> PackedWeight:
    """The inverse of `pack`, bit for bit."""
    code = torch.stack([_codes(one) for one in w["weight"].view(-1, *w["weight"].shape[-2:])])
    code = code.view(*w["weight"].shape[:-2], *code.shape[-2:])[..., : w.out_features, :]
    scale = w["scale"].mT[..., : w.out_features, :].clone(memory_format=torch.contiguous_format)
    tensors = {"weight": (code[..., 0::2] | (code[..., 1::2] << 4)).contiguous(), "scale": scale}
    if Fmt.parse(w.fmt).has_zero:
        zero = w["offset"].mT[..., : w.out_features, :]
        tensors["zero"] = (ZERO - zero.to(torch.int16)).to(torch.uint8).contiguous()
    return like(w, tensors)


def _codes(weight: Tensor) -> Tensor:
    """weight: int32[in, out / 8] -> uint8[out, in], of the codes 0 to 15."""
    inner, columns = weight.shape[0], weight.shape[1] * CODES
    one = torch.ones(1, columns, dtype=torch.bfloat16, device=weight.device)
    eye = torch.eye(inner, dtype=torch.bfloat16, device=weight.device)
    # Small integers: exact.
    code = torch.cat([torch_npu.npu_weight_quant_batchmatmul(part, weight, one) for part in eye.split(AT_ONCE)])
    return (code.t().to(torch.int16) + ZERO).to(torch.uint8)


def filled(x: Tensor) -> Tensor:
    """x: [..., out] -> its own memory, [..., out rounded up to whole int32], zeros after what is there."""
    filled = F.pad(x, (0, -x.shape[-1] % CODES))
    return filled.clone(memory_format=torch.contiguous_format)


def _product(x: Tensor, w: PackedWeight, scale: Tensor, offset: Tensor | None, bias: Tensor | None) -> Tensor:
    """x: [T, in] -> [T, out]. One group is a channel's own scale, which the op is told by no group size."""
    group = Fmt.parse(w.fmt).group or 0
    size = group if scale.shape[0] > 1 else 0
    y: Tensor = torch_npu.npu_weight_quant_batchmatmul(
        x, w["weight"], scale, offset, bias=bias, antiquant_group_size=size
    )
    return y
