"""gemm.linear_gated is its parts, one after the other, on whatever stands for them."""

from __future__ import annotations

import pytest
import torch

from sglang_core.ops import OPS
from sglang_core.ops.activation import GateKind, gated
from sglang_core.ops.gemm import dense, linear
from sglang_core.ops.linear_gated import linear_gated
from sglang_core.ops.quant import quantize


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("fmt", ["dense", "int8.token_channel", "int4.awq.g32"])
def test_it_is_its_parts(fmt: str, kind: GateKind) -> None:
    x, matrix, bias = torch.randn(5, 64).bfloat16(), torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    w = dense(matrix) if fmt == "dense" else quantize(matrix, fmt)
    assert torch.equal(linear_gated(x, w, kind, bias), gated(linear(x, w, bias), kind))
    assert torch.equal(linear_gated(x, w, kind), gated(linear(x, w), kind))


def test_a_decomposition_calls_what_stands_for_its_parts() -> None:
    called: list[str] = []

    def bind(part: str):  # type: ignore[no-untyped-def]
        return lambda *args: (called.append(part), OPS[part].body(*args))[1]

    OPS["gemm.linear_gated"].decompose(bind)(torch.randn(2, 8), dense(torch.randn(6, 8)), "silu")
    assert called == ["gemm.linear", "act.gated"]
