"""What pools store, as dots take it: every code of fp8, and every value of int8."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from sglang_triton.attention_codes import numbers

DOTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _numbers(x, y, DOT: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(y + at, numbers(tl.load(x + at), DOT))


@pytest.mark.parametrize("dot", DOTS)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float16])
def test_codes_are_the_numbers_that_torch_says(stored: torch.dtype, dot: torch.dtype) -> None:
    if stored.itemsize == 1:
        x = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(stored)
        given = x.view(torch.uint8) if stored == torch.float8_e4m3fn else x
    else:
        given = x = torch.linspace(-3, 3, 256).to(stored)
    y = torch.empty(256, dtype=dot)
    _numbers[(1,)](given, y, DOT=DOTS[dot])
    assert torch.equal(y.nan_to_num(nan=1e4), x.float().to(dot).nan_to_num(nan=1e4))
