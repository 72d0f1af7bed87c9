"""What cached keys and values may be stored in, and how numbers become codes and come back.

float32, bfloat16, float16: as they are. fp8_e4m3 (float8_e4m3fn) has static scales, one a KV head: calibration wrote them, or they
are 1. int8 is symmetric with a dynamic scale for each token and head, kept beside the codes: it has no exponent, so that one scale for
all tokens would be as coarse as the largest outlier asks, and hardly any checkpoint brings such scales. They cost four bytes each.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

KV_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "fp8_e4m3": torch.float8_e4m3fn,
        "int8": torch.int8,
    }
)
FP8_MAX, INT8_MAX = 448.0, 127.0
Scaling = Literal["none", "static", "dynamic"]


def scaling_of(dtype: torch.dtype) -> Scaling:
    """Which scales a pool of this dtype has."""
    if dtype == torch.float8_e4m3fn:
        return "static"
    return "dynamic" if dtype == torch.int8 else "none"


def encode_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x: [T, H, D], scale: float32[H] -> float8_e4m3fn[T, H, D]: x / scale in float32, to the nearest code, saturated at +-448."""
    return (x.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def encode_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, H, D] -> int8[T, H, D] in +-127, scale: float32[T, H, 1], the largest magnitude / 127. Zeros have scale 0."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / INT8_MAX
    code = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-INT8_MAX, INT8_MAX)
    return code.to(torch.int8), scale


def heads_first(x: Tensor, rows: Tensor) -> Tensor:
    """x: [..., H, D], tokens before heads; rows: int32[B, S] -> [B, H, S, D] in its dtype. One gather of whole heads."""
    heads, dim = x.shape[-2:]
    head = torch.arange(heads, dtype=torch.int32, device=x.device)[:, None]
    index = (rows[:, None] * heads + head).flatten()
    return x.reshape(-1, dim).index_select(0, index).view(rows.shape[0], heads, -1, dim)
