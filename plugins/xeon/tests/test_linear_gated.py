"""gemm.linear_gated: the same bits as gemm.linear and act.gated after it, on every ISA level, in every format."""

from __future__ import annotations

import pytest
import torch
from sglang_xeon import activation, gemm
from test_gemm import dense
from test_gemm_formats import FORMATS, quantized
from tolerance import assert_close

from sglang_core.api.ops import OPS, GateKind, PackedWeight

# Up columns that begin a panel, and that begin within one; rows for every tile, and more than a block of them.
SHAPES = [(1, 96, 272), (2, 16, 48), (4, 40, 256), (13, 200, 256), (97, 33, 272), (400, 24, 64)]


def check(weight: PackedWeight, rows: int, dtype: torch.dtype, kind: GateKind) -> None:
    w, x = gemm.pack(weight), torch.randn(rows, weight.in_features).to(dtype)
    bias = torch.randn(weight.out_features).to(dtype) if rows % 2 else None
    for linear, gated in ((gemm.linear, gemm.linear_gated), (gemm.linear_amx, gemm.linear_gated_amx)):
        assert torch.equal(gated(x, w, kind, bias), activation.gated(linear(x, w, bias), kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", activation.KINDS)
def test_dense(level: str, dtype: torch.dtype, kind: GateKind) -> None:
    for rows, width, k in SHAPES:
        check(dense(torch.randn(2 * width, k).to(dtype)), rows, dtype, kind)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format(level: str, fmt: str) -> None:
    for rows, width, k in SHAPES:
        check(quantized(fmt, 2 * width, k), rows, torch.bfloat16, "silu")


def test_it_is_the_body(level: str) -> None:
    x, w, bias = torch.randn(2, 3, 80), dense(torch.randn(2 * 37, 80)), torch.randn(2 * 37)
    want = OPS["gemm.linear_gated"].body(x.double(), dense(w["weight"].double()), "gelu_tanh", bias.double())
    assert_close(gemm.linear_gated(x, gemm.pack(w), "gelu_tanh", bias), want.float(), scale=80)


def test_no_rows_and_no_columns(level: str) -> None:
    w = gemm.pack(dense(torch.randn(64, 32)))
    assert gemm.linear_gated(torch.empty(0, 32), w, "silu").shape == (0, 32)


def test_gate_and_up_are_equally_many() -> None:
    with pytest.raises(RuntimeError, match="equally many, not 33"):
        gemm.linear_gated(torch.randn(1, 32), gemm.pack(dense(torch.randn(33, 32))), "silu")
