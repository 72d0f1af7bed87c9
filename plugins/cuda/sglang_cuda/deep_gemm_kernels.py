"""gemm.linear in fp8.block128 by DeepGEMM. Importing this imports it."""

from __future__ import annotations

import deep_gemm
import torch
from sglang_triton.gpu.linear import fp8_codes
from torch import Tensor

from sglang_core.api.ops import Codes, PackedWeight


def linear(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: bfloat16[..., in], w in fp8.block128 -> bfloat16[..., out]. It takes no bias: that is added to the rounded product."""
    code, scale = fp8_codes(x, "fp8_block")
    y = torch.empty(code.shape[0], w.out_features, dtype=torch.bfloat16, device=code.device)
    if y.numel():
        deep_gemm.gemm_fp8_fp8_bf16_nt((code, scale), (w["weight"], w["scale"]), y)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], w.out_features)
