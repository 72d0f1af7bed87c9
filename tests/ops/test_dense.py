"""Linear, gated activations, embedding lookup."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sglang_core.ops.activation import GateKind, gated
from sglang_core.ops.embedding import embed_lookup
from sglang_core.ops.gemm import dense, linear

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype: torch.dtype, tokens: int, bias: bool) -> None:
    x, w, b = torch.randn(tokens, 33).to(dtype), torch.randn(17, 33).to(dtype), torch.randn(17).to(dtype)
    packed = dense(w)
    assert (packed.fmt, packed.out_features, packed.in_features) == ("dense", 17, 33)
    want = x.double() @ w.double().T + (b.double() if bias else 0)
    eps = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 0)
    torch.testing.assert_close(linear(x, packed, b if bias else None).double(), want, atol=8 * eps, rtol=2 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated(dtype: torch.dtype, kind: GateKind) -> None:
    x = (3 * torch.randn(6, 22)).to(dtype)
    gate, up = x.double().chunk(2, -1)
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}[kind]
    eps = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 0)
    torch.testing.assert_close(gated(x, kind).double(), act(gate) * up, atol=eps, rtol=eps)
    assert gated(x[:0], kind).shape == (0, 11)


def test_gated_refuses_an_unknown_kind() -> None:
    with pytest.raises(AssertionError, match="'relu'"):
        gated(torch.ones(1, 2), "relu")  # type: ignore[arg-type]


def test_lookup() -> None:
    weight, ids = torch.randn(11, 4), torch.tensor([3, 0, 10, 3], dtype=torch.int32)
    assert torch.equal(embed_lookup(ids, weight), weight[[3, 0, 10, 3]])
    assert embed_lookup(ids[:0], weight).shape == (0, 4)


def test_lookup_summed_over_ranks_is_the_whole() -> None:
    weight, ids = torch.randn(11, 4), torch.tensor([3, 0, 10, 5], dtype=torch.int32)
    weight[0] = torch.nan  # on a rank that does not own id 0, row 0 of its part must not leak
    parts = [embed_lookup(ids, weight[a:b], a) for a, b in ((0, 4), (4, 8), (8, 11))]
    torch.testing.assert_close(sum(parts), weight[[3, 0, 10, 5]], equal_nan=True)
    assert parts[1].isfinite().all()
