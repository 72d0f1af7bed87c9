"""gemm.linear with weights of 4 bits, by npu_weight_quant_batchmatmul, which multiplies what codes stand for.

How codes lie in an int32 is the vendor's affair: npu_convert_weight_to_int4pack puts them there, and a product with the identity takes them out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from sglang_core.api.ops import Fmt, PackedWeight

ZERO = 8  # of the codes 0 to 15, what the vendor's -8 to 7 call 0
CODES = 8  # in an int32: so many rows of a weight, filled up with zeros
AT_ONCE = 1024  # rows of the identity


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w in int4.awq, int4.gptq or int4.pack -> [..., out]. The vendor's op rounds a scale to x.dtype, as it is called, and so do we."""
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], w.out_features)
    if bias is not None:  # bfloat16 wants it wider
        bias = _filled(bias.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype))
    offset = w["offset"].to(x.dtype) if Fmt.parse(w.fmt).has_zero else None
    y = _product(rows.contiguous(), w, w["scale"].to(x.dtype), offset, bias)
    return y[:, : w.out_features].reshape(*x.shape[:-1], w.out_features)


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """weight: int32[in, out / 8], scale: float32[G, out], offset: int8[G, out] (out rounded up to whole int32), which is added to a code before it is scaled."""
    byte = w["weight"]
    code = torch.stack([byte & 15, byte >> 4], dim=-1).flatten(-2)[:, : w.in_features]
    signed = _filled(code.t().to(torch.int32) - ZERO)
    made = {"weight": torch_npu.npu_convert_weight_to_int4pack(signed), "scale": _filled(w["scale"].t())}
    if Fmt.parse(w.fmt).has_zero:
        made["offset"] = _filled((ZERO - w["zero"].t().to(torch.int16)).to(torch.int8))
    if out is None:
        return PackedWeight(w.fmt, made, out_features=w.out_features, in_features=w.in_features, layout="npu.int4")
    for name, tensor in made.items():
        out[name].copy_(tensor)
    return out


def unpack(w: PackedWeight) -> PackedWeight:
    """The inverse of `pack`, bit for bit."""
    rows, one = w.out_features, torch.ones_like(w["scale"], dtype=torch.bfloat16)
    eye = torch.eye(w.in_features, dtype=torch.bfloat16, device=one.device)
    code = torch.cat([_product(part, w, one, None, None) for part in eye.split(AT_ONCE)])  # small integers: exact
    code = (code.t()[:rows].to(torch.int16) + ZERO).to(torch.uint8)
    scale = w["scale"].t()[:rows].clone(memory_format=torch.contiguous_format)
    tensors = {"weight": (code[:, 0::2] | (code[:, 1::2] << 4)).contiguous(), "scale": scale}
    if Fmt.parse(w.fmt).has_zero:
        tensors["zero"] = (ZERO - w["offset"].t()[:rows].to(torch.int16)).to(torch.uint8).contiguous()
    return PackedWeight(w.fmt, tensors, out_features=w.out_features, in_features=w.in_features)


def _filled(x: Tensor) -> Tensor:
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
