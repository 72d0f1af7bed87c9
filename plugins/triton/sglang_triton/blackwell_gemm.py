"""gemm.linear in fp8 for Blackwell, by the kernel of `blackwell_gemm_kernels`. Of the provider `blackwell`, for more than a few rows."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api.ops import Codes, PackedWeight
from sglang_triton.blackwell_gemm_kernels import _linear_blackwell
from sglang_triton.gluon_gemm import BLACKWELL, form_specs, multiply


def linear(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w: [out, in] in fp8, bias: [out] -> [..., out]."""
    return multiply(_linear_blackwell, BLACKWELL, x, w, bias)


AOT = form_specs(_linear_blackwell, BLACKWELL)
