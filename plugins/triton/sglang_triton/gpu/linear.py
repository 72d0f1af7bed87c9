"""gemm.linear by PyTorch's own products: cuBLAS, cuBLASLt or hipBLASLt, as the build has it.

`torch.nn.functional.scaled_mm` multiplies codes of fp8, sums in float32 and scales rows and columns at the end, or blocks on the way. It wants the
second matrix column by column, which is what a canonical weight is, transposed: nothing is packed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from sglang_core.api.ops import CodeKind, Codes, PackedWeight
from sglang_triton.quantize import quantise
from sglang_triton.rows import as_rows

E4M3_MAX = 448.0


def dense(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w: [out, in] -> [..., out]."""
    return F.linear(x, w["weight"], bias)


def row_scaled(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: bfloat16[..., in], w in fp8.tensor or fp8.token_channel -> bfloat16[..., out]."""
    code, scale = fp8_codes(x, "fp8")
    return by_rows(code, scale, w["weight"], w["scale"], bias).view(*x.shape[:-1], w.out_features)


def static_scaled(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: bfloat16[..., in], w in fp8.tensor.static -> bfloat16[..., out]."""
    code, scale = static_codes(as_rows(x), w["x_scale"])
    return by_rows(code, scale, w["weight"], w["scale"], bias).view(*x.shape[:-1], w.out_features)


def block_scaled(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: bfloat16[..., in], w in fp8.block128, out a multiple of 128 and in of 512 -> bfloat16[..., out]."""
    code, scale = fp8_codes(x, "fp8_block")
    return by_blocks(code, scale, w["weight"], w["scale"], bias).view(*x.shape[:-1], w.out_features)


def fp8_codes(x: Tensor | Codes, kind: CodeKind) -> tuple[Tensor, Tensor]:
    """x: [..., K], quantised already or not -> codes float8_e4m3fn[T, K], float32[T, 1] or [T, K / 128]."""
    if isinstance(x, Codes):
        return as_rows(x.code), as_rows(x.scale)
    code, scale = quantise(as_rows(x), kind)
    return code.view(torch.float8_e4m3fn), scale


def static_codes(x: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, K], x_scale: float32[1] -> codes float8_e4m3fn[T, K], float32[T, 1]."""
    code = (x.float() / x_scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return code, x_scale.view(1, 1).expand(x.shape[0], 1).contiguous()


def by_rows(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x: fp8[T, K], x_scale: float32[T, 1], w: fp8[N, K], w_scale: float32[N], bias: bfloat16[N] -> bfloat16[T, N]."""
    if x.shape[0] == 0:
        return x.new_empty(0, w.shape[0], dtype=torch.bfloat16)
    row = ScalingType.RowWise
    return scaled_mm(x, w.t(), x_scale, row, w_scale.view(1, -1), row, bias=bias, output_dtype=torch.bfloat16)


def by_blocks(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As `by_rows`; x_scale: float32[T, K / 128], w_scale: float32[N / 128, K / 128].

    The scales of x are wanted column by column, those of the weight with columns in multiples of four: as they are, where K is one of 512.
    Which products take a bias depends on cuBLASLt; so it is added to float32 sums, which are then rounded once.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, w.shape[0], dtype=torch.bfloat16)
    y = scaled_mm(
        x,
        w.t(),
        x_scale.new_empty(x_scale.shape[::-1]).copy_(x_scale.t()).t(),  # contiguous() leaves one row as it is
        ScalingType.BlockWise1x128,
        w_scale.t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16 if bias is None else torch.float32,
    )
    return y if bias is None else (y + bias).to(torch.bfloat16)
