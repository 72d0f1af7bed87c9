"""gemm.linear of few rows on int4 weights, whose inputs a program adds up in several parts."""

from __future__ import annotations

import pytest
import torch
from sglang_triton import gemm_parts, tuning
from sglang_triton.gemm import linear, linear_invariant
from sglang_triton.packed import format_constexprs
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("fmt", ["int4.awq.g128", "int4.pack.g128"])
def test_few_rows(fmt: str, tokens: int, dtype: torch.dtype) -> None:
    """With zeros of its own and without; outputs that are no multiple of a tile, rows that lie apart, a bias."""
    torch.manual_seed(0)
    w, bias = OPS["quant.quantize"].body(torch.randn(70, 2048), fmt), torch.randn(70).to(dtype)
    x = torch.randn(tokens, 2056).to(dtype)[:, 8:]
    facts = format_constexprs(fmt, 2048)
    assert gemm_parts.config_of(x, facts, tokens, 70) is not None
    assert_close(linear(x, w, bias), OPS["gemm.linear"].body(x, w, bias), scale=20)
    assert_close(linear(x, w), OPS["gemm.linear"].body(x, w), scale=20)


def test_what_is_not_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "current_arch", lambda: "sm_90")
    tuning.choose.cache_clear()
    x = torch.empty(16, 4096, dtype=torch.bfloat16)
    facts = format_constexprs("int4.awq.g128", 4096)
    assert gemm_parts.config_of(x, facts, 16, 8192) is not None
    for other in (
        gemm_parts.config_of(x, facts, 17, 8192),
        gemm_parts.config_of(x, facts, 16, 8193),
        gemm_parts.config_of(x.float(), facts, 16, 8192),
        gemm_parts.config_of(x[:, :640], format_constexprs("int4.awq.g128", 640), 16, 8192),
        gemm_parts.config_of(x, format_constexprs("int4.awq.g64", 4096), 16, 8192),
        gemm_parts.config_of(x, format_constexprs("mxfp4.g32", 4096), 16, 8192),
    ):
        assert other is None
    tuning.choose.cache_clear()


@pytest.mark.usefixtures("tiles")
def test_invariant_products_keep_one_order_of_sums() -> None:
    torch.manual_seed(0)
    w = OPS["quant.quantize"].body(torch.randn(40, 1024), "int4.awq.g128")
    x = torch.randn(70, 1024).to(torch.bfloat16)
    assert torch.equal(linear_invariant(x[3:4], w), linear_invariant(x, w)[3:4])
