"""`Codes`: activations that were quantised where they were made, as the linear layer they go to would have done itself."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sglang_core.ops.formats import BLOCK
from sglang_core.ops.quant import quantize_block, quantize_token, spread
from sglang_core.ops.rounding import wide_dtype

# The `activation` of formats whose codes need nothing of the weight: no static scale, no zero point.
CodeKind = Literal["fp8", "fp8_block", "int8"]
CODE_KINDS: tuple[str, ...] = get_args(CodeKind)


class Codes(NamedTuple):
    """What `gemm.linear` takes in place of x: [..., in]. It gives the bits that it gives of x."""

    code: Tensor  # float8_e4m3fn or int8 [..., in]
    scale: Tensor  # float32 [..., 1]; of "fp8_block" [..., ceil(in / 128)]
    dtype: torch.dtype  # of x, and so of what becomes of it

    @property
    def shape(self) -> torch.Size:
        return self.code.shape


def coded(x: Tensor, kind: CodeKind) -> Codes:
    """x: [..., in], quantised as weights of such formats ask for (`ops/quant.py`)."""
    return Codes(*(quantize_block(x) if kind == "fp8_block" else quantize_token(x, kind)), x.dtype)


def decoded(x: Codes) -> Tensor:
    """What codes and scales stand for: float32[..., in], or float64 of codes of such a tensor."""
    wide = wide_dtype(x.dtype)
    scale = x.scale if x.scale.shape[-1] == 1 else spread(x.scale, x.code.shape[-1], BLOCK)
    return x.code.to(wide) * scale.to(wide)
