"""gemm.linear in fp8 for Hopper, by the kernel of `hopper_gemm_kernels`. Of the provider `hopper`, for more than a few rows."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api.ops import Codes, PackedWeight
from sglang_triton.gluon_gemm import Form, form_specs, multiply
from sglang_triton.hopper_gemm_kernels import HALF, STEP, _linear_hopper
from sglang_triton.hopper_kernels import ROWS

FORM = Form(
    arch="sm_90",
    name="hopper",
    x=(ROWS.value, STEP.value),
    w=(HALF.value, STEP.value),
    y=(ROWS.value, HALF.value),
    instructions=(
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3",
        "cp.async.bulk.tensor.2d.shared::",
        "cp.async.bulk.tensor.2d.global.shared::cta",
        "setmaxnreg",
        "mbarrier.try_wait",
    ),
)


def linear(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w: [out, in] in fp8, bias: [out] -> [..., out]."""
    return multiply(_linear_hopper, FORM, x, w, bias)


AOT = form_specs(_linear_hopper, FORM)
