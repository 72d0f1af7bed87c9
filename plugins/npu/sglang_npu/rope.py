"""rope.apply by npu_rotary_mul."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from sglang_core.api.ops import RopeSpec


def rope_apply(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [T, Hk, D], positions: int32[T], table: float32[L, rotary_dim] -> q, k rotated, in their dtypes.

    In float32: the op multiplies in the dtype that it is given. Its cosines may not exceed 1, so a factor in the table is applied at the end.
    """
    if not q.shape[0]:
        return q, k
    cos, sin = (_spread(x, spec) for x in (table[positions] / spec.attention_factor).chunk(2, dim=-1))
    return _rotate(q, cos, sin, spec), _rotate(k, cos, sin, spec)


def _spread(x: Tensor, spec: RopeSpec) -> Tensor:
    """float32[T, rotary_dim / 2], one of each pair of dims -> [1, T, 1, rotary_dim], one of each dim."""
    x = torch.cat([x, x], dim=-1) if spec.style == "neox" else x.repeat_interleave(2, dim=-1)
    return x[None, :, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> Tensor:
    """x: [T, H, D]: layout BSND, B = 1."""
    if not x.numel():
        return x
    turned, rest = x[..., : spec.rotary_dim].float(), x[..., spec.rotary_dim :]
    mode = "half" if spec.style == "neox" else "interleave"
    y = torch_npu.npu_rotary_mul(turned[None].contiguous(), cos, sin, mode)[0] * spec.attention_factor
    return torch.cat([y.to(x.dtype), rest], dim=-1) if rest.shape[-1] else y.to(x.dtype)
