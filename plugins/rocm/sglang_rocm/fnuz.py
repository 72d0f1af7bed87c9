"""gemm.linear in fp8 on CDNA 3, whose e4m3 is not that of checkpoints.

Its matrix cores read a byte as e4m3fnuz: the exponent's bias is 8 where the Open Compute Project's e4m3fn has 7, so the same bits stand for half
the number; there is no -0, and 0x80, which would be it, is NaN; 0x7f and 0xff, there NaN, are 240 and -240 here. So a code is the same byte, once a
-0 is made a 0. Codes are then those of the op to the last, 448 at most, which the device reads as 224; a quantiser of its own would reach 240,
which stands for 480, and be another quantisation. Each product of two codes comes out a quarter of what it should be: the scales of the
activations are made four times as large. They come of numbers divided by 448 and cannot overflow; scales of a checkpoint, doubled, could.
"""

from __future__ import annotations

import torch
from sglang_triton.gpu.linear import by_rows, fp8_codes, static_codes
from sglang_triton.rows import as_rows
from torch import Tensor

from sglang_core.api import WeightError
from sglang_core.api.ops import Codes, PackedWeight

LAYOUT = "rocm.fnuz"
MINUS_ZERO = 0x80  # of e4m3fn; NaN of e4m3fnuz
NAN = 0x7F  # of e4m3fn, of either sign
QUARTERS = 4.0


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """The same bytes without -0: Triton's kernels read what they stood for, hipBLASLt the half of it. Raises WeightError on a NaN."""
    code = w["weight"].view(torch.uint8)
    if bool((code & NAN == NAN).any()):
        raise WeightError(
            f"a {w.fmt} weight of {w.out_features} x {w.in_features} has codes that are NaN; get another checkpoint"
        )
    tensors = dict(w.named_buffers()) | {"weight": without_minus_zero(code).view(w["weight"].dtype)}
    if out is None:
        return PackedWeight(
            w.fmt,
            tensors,
            out_features=w.out_features,
            in_features=w.in_features,
            num_experts=w.num_experts,
            layout=LAYOUT,
        )
    for name, tensor in tensors.items():
        out[name].copy_(tensor)
    return out


def unpack(w: PackedWeight) -> PackedWeight:
    """Canonical again; a -0 stays the 0 that it became."""
    tensors = {name: tensor.clone() for name, tensor in w.named_buffers()}
    return PackedWeight(
        w.fmt, tensors, out_features=w.out_features, in_features=w.in_features, num_experts=w.num_experts
    )


def row_scaled(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: bfloat16[..., in], w packed, in fp8.tensor or fp8.token_channel -> bfloat16[..., out]."""
    code, scale = fp8_codes(x, "fp8")
    return _product(code.view(torch.uint8), scale, w, bias).view(*x.shape[:-1], w.out_features)


def static_scaled(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: bfloat16[..., in], w packed, in fp8.tensor.static -> bfloat16[..., out]."""
    code, scale = static_codes(as_rows(x), w["x_scale"])
    return _product(code.view(torch.uint8), scale, w, bias).view(*x.shape[:-1], w.out_features)


def _product(code: Tensor, scale: Tensor, w: PackedWeight, bias: Tensor | None) -> Tensor:
    """code: uint8[T, K] of e4m3fn, scale: float32[T, 1] -> bfloat16[T, N]."""
    x, weight = without_minus_zero(code), w["weight"]
    return by_rows(
        x.view(torch.float8_e4m3fnuz), scale * QUARTERS, weight.view(torch.float8_e4m3fnuz), w["scale"], bias
    )


def without_minus_zero(code: Tensor) -> Tensor:
    """uint8[...] -> the same, 0 for 0x80."""
    return code.masked_fill(code == MINUS_ZERO, 0)
