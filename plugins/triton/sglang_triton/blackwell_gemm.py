"""gemm.linear in fp8 for Blackwell, by the kernel of `blackwell_gemm_kernels`. Of the provider `blackwell`, for more than a few rows."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api.ops import Codes, PackedWeight
from sglang_triton.blackwell_gemm_kernels import COLUMNS, PART, ROWS, STEP, _linear_blackwell
from sglang_triton.gluon_gemm import Form, form_specs, multiply

FORM = Form(
    arch="sm_100",
    name="blackwell",
    x=(ROWS.value, STEP.value),
    w=(COLUMNS.value, STEP.value),
    y=(ROWS.value, PART.value),
    instructions=(
        "tcgen05.alloc",
        "tcgen05.mma.cta_group::1.kind::f8f6f4",
        "tcgen05.commit",
        "tcgen05.ld.sync",
        "cp.async.bulk.tensor.2d.shared::",
        "cp.async.bulk.tensor.2d.global.shared::cta",
        "setmaxnreg",
        "mbarrier.try_wait",
    ),
)


def linear(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w: [out, in] in fp8, bias: [out] -> [..., out]."""
    return multiply(_linear_blackwell, FORM, x, w, bias)


AOT = form_specs(_linear_blackwell, FORM)
