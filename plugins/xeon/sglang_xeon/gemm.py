"""gemm.linear: weights packed once in panels of 16 output columns, pairs of k side by side (csrc/gemm.inl).

One copy serves every batch size and every ISA level. With AMX and many rows, oneDNN's tile GEMM wins; it reads a plain
matrix, unpacked for the call: that costs two passes over the weight, where keeping both layouts would cost its memory twice.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sglang_core.api.ops import PackedWeight
from sglang_xeon.library import ops

LAYOUT = "xeon.panels"
UNPACK_FROM = 256  # rows from which oneDNN's AMX GEMM repays unpacking

_linear, _pack, _unpack = ops.linear.default, ops.pack.default, ops.unpack.default


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in] -> [..., out]. Each output is one float32 sum in ascending order of k, whatever the batch."""
    n, k = w.out_features, w.in_features
    if x.dim() == 2:
        y: Tensor = _linear(x, w["packed"], bias, n, k)
        return y
    return _linear(x.reshape(-1, k), w["packed"], bias, n, k).view(*x.shape[:-1], n)  # type: ignore[no-any-return]


def linear_amx(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As `linear`; through oneDNN where there are rows enough for AMX tiles."""
    if x.numel() < UNPACK_FROM * w.in_features or w["packed"].dtype != x.dtype:
        return linear(x, w, bias)
    return F.linear(x, _unpack(w["packed"], w.out_features, w.in_features), bias)


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """[out, in] -> panels, padded to whole ones with zeros. With `out`, an earlier result, its bytes are rewritten."""
    packed = _pack(w["weight"])
    if out is not None:
        out["packed"].copy_(packed)
        return out
    return PackedWeight(
        w.fmt, {"packed": packed}, out_features=w.out_features, in_features=w.in_features, layout=LAYOUT
    )


def unpack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """The inverse of `pack`."""
    weight = _unpack(w["packed"], w.out_features, w.in_features)
    if out is not None:
        out["weight"].copy_(weight)
        return out
    return PackedWeight(w.fmt, {"weight": weight}, out_features=w.out_features, in_features=w.in_features)
