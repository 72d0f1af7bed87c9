"""A layer of a pool as kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_core.api import Pool
from sglang_triton.tuning import current_arch

OCP_FP8 = ("sm_90", "sm_100", "gfx950")  # convert OCP's e4m3 themselves


@dataclass(frozen=True, slots=True)
class Leaves:
    """The layer's two leaves, fp8 codes as bytes unless `native_fp8`, and the scales of codes if any."""

    k: Tensor  # [N, P, Hk, D]
    v: Tensor  # [N, P, Hk, Dv]
    k_scale: Tensor | None
    v_scale: Tensor | None
    scaling: str

    @classmethod
    def of(cls, pool: Pool, layer: int, *, native_fp8: bool) -> Leaves:
        k, v, scaling = pool.k(layer), pool.v(layer), pool.spec.scaling
        if scaling == "none":
            return cls(k, v, None, None, scaling)
        if scaling == "static" and not native_fp8:
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        return cls(k, v, pool.k_scale(layer), pool.v_scale(layer), scaling)


def has_ocp_fp8() -> bool:
    """Whether the device at hand converts fp8 codes; elsewhere kernels read them as bytes."""
    return current_arch() in OCP_FP8
