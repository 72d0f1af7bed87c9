"""attn.mla_project against its op body, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.mla_project import mla_project
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS

pytestmark = pytest.mark.usefixtures("tiles")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_each_head_has_its_matrix(num_tokens: int, dtype: torch.dtype) -> None:
    """Heads that lie apart, sizes that are no multiples of a tile, and matrices that are dense in either dim."""
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 3, 56).to(dtype)[..., 16:]
    into = (40**-0.5 * torch.randn(3, 40, 72)).to(dtype)
    for weight in (into, into.mT.contiguous().mT):
        got = mla_project(x, weight)
        assert got.is_contiguous()
        assert_close(got, OPS["attn.mla_project"].body(x, weight), scale=4)
