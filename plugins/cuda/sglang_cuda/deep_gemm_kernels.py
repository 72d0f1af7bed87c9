"""gemm.linear in fp8.block128 by DeepGEMM. Importing this imports it."""

from __future__ import annotations

import deep_gemm
import torch
from sglang_triton.quantize import quantise
from sglang_triton.rows import as_rows
from torch import Tensor

from sglang_core.api.ops import PackedWeight


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: bfloat16[..., in], w in fp8.block128 -> bfloat16[..., out]. It takes no bias: that is added to the rounded product."""
    rows = as_rows(x)
    y = torch.empty(rows.shape[0], w.out_features, dtype=torch.bfloat16, device=x.device)
    if y.numel():
        code, scale = quantise(rows, "fp8_block")
        deep_gemm.gemm_fp8_fp8_bf16_nt((code.view(torch.float8_e4m3fn), scale), (w["weight"], w["scale"]), y)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], w.out_features)
