"""gemm.linear in fp8 for Hopper, by the kernel of `hopper_gemm_kernels`. Of the provider `hopper`, for more than a few rows."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api.ops import Codes, PackedWeight
from sglang_triton.gluon_gemm import HOPPER, form_specs, multiply
from sglang_triton.hopper_gemm_kernels import _linear_hopper


def linear(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w: [out, in] in fp8, bias: [out] -> [..., out]."""
    return multiply(_linear_hopper, HOPPER, x, w, bias)


AOT = form_specs(_linear_hopper, HOPPER)
