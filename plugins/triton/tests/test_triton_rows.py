"""Norms, rope and embeddings against their op bodies, through the interpreter, in tiles of several sizes."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.embedding import embed_lookup
from sglang_triton.norm import add_rms_norm, layer_norm, rms_norm, rms_norm_gated
from sglang_triton.rope import rope_apply
from torch import Tensor
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS, RopeSpec

pytestmark = pytest.mark.usefixtures("tiles")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 64), (1, 33), (19, 128), (3, 1500)]
EPS = 1e-6


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert_close(rms_norm(x, weight, EPS), OPS["norm.rms"].body(x, weight, EPS))


def test_rms_norm_of_heads_of_a_fused_projection() -> None:
    """Tokens and heads lie apart by strides that make no one stride of rows."""
    qkv, weight = torch.randn(5, 9, 40), torch.randn(24)
    heads = qkv[:, 2:6, 8:32]
    assert_close(rms_norm(heads, weight, EPS), OPS["norm.rms"].body(heads, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_gated(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, gate, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert_close(rms_norm_gated(x, gate, weight, EPS), OPS["norm.rms_gated"].body(x, gate, weight, EPS))


def test_rms_norm_gated_by_heads_of_a_fused_projection() -> None:
    """The gate's tokens lie apart by another stride than those of x."""
    x, projected, weight = torch.randn(5, 4, 24), torch.randn(5, 9 * 24), torch.randn(24)
    gate = projected[:, 5 * 24 :].unflatten(1, (4, 24))
    assert_close(rms_norm_gated(x, gate, weight, EPS), OPS["norm.rms_gated"].body(x, gate, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The residual is a rounded sum of two numbers, so it is what the body's is, to the bit."""
    x, residual = torch.randn(shape).to(dtype), (5 * torch.randn(shape)).to(dtype)
    weight = torch.randn(shape[-1])
    (y, total), (want, want_total) = (f(x, residual, weight, EPS) for f in (add_rms_norm, OPS["norm.add_rms"].body))
    assert_close(y, want)
    assert torch.equal(total, want_total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_far_from_zero(has_bias: bool, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(5, 200) + 100).to(dtype), torch.randn(200).to(dtype)
    bias = torch.randn(200).to(dtype) if has_bias else None
    assert_close(layer_norm(x, weight, bias, EPS), OPS["norm.layer"].body(x, weight, bias, EPS), scale=10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (20, 6), (96, 32)])
def test_rope(head_dim: int, rotary_dim: int, style: str, dtype: torch.dtype) -> None:
    spec = RopeSpec(head_dim=head_dim, rotary_dim=rotary_dim, style=style)  # type: ignore[arg-type]
    qkv = torch.randn(5, 11, head_dim).to(dtype)
    q, k = qkv[:, :7], qkv[:, 7:9]
    args = q, k, torch.tensor([3, 0, 9, 9, 1], dtype=torch.int32), torch.randn(10, rotary_dim), spec
    for got, want in zip(rope_apply(*args), OPS["rope.apply"].body(*args), strict=True):
        assert_close(got, want)
        assert torch.equal(got[..., rotary_dim:], want[..., rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 7])
def test_embedding_of_a_slice_of_the_vocabulary(start: int, dtype: torch.dtype) -> None:
    weight = torch.randn(11, 70).to(dtype)[:, 3:67]
    ids = torch.tensor([0, 7, 17, 18, -1, 10, 12], dtype=torch.int32)
    assert _same(embed_lookup(ids, weight, start), OPS["embed.lookup"].body(ids, weight, start))
    assert embed_lookup(ids[:0], weight).shape == (0, 64)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)
