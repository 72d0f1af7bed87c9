"""attn.ragged and attn.merge against their bodies, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton import attention
from triton_attention_cases import DTYPES, Reqs, spec_of
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS, AttnSpec, RaggedBatch

LENS: Reqs = [(40, 40), (1, 1), (0, 0), (5, 90), (70, 9), (3, 0)]  # (queries, keys) each
EMPTY = float("-inf")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def check(spec: AttnSpec, dtype: torch.dtype = torch.float32, *, padding: int = 0) -> None:
    batch = RaggedBatch.of(*zip(*LENS, strict=True), CPU)
    tokens, keys, heads = int(batch.cu_q[-1]) + padding, int(batch.cu_k[-1]), spec.num_heads + 2 * spec.num_kv_heads
    width = max(spec.head_dim, spec.v_head_dim)
    qkv = torch.randn(max(tokens, keys), heads, width).to(dtype)  # one projection: rows lie apart
    q, k, v = qkv.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
    q, k, v = q[:tokens, :, : spec.head_dim], k[:keys, :, : spec.head_dim], v[:keys, :, : spec.v_head_dim]
    want, want_lse = OPS["attn.ragged"].body(q, k, v, batch, spec, lse=True)
    got, lse = attention.ragged(q, k, v, batch, spec, lse=True)
    assert_close(got, want, scale=4.0)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)
    assert torch.equal(attention.ragged(q, k, v, batch, spec), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_is_the_body(causal: bool, dtype: torch.dtype) -> None:
    check(spec_of(causal=causal), dtype)


@pytest.mark.parametrize("facts", [{"window": 9}, {"window": 1}, {"soft_cap": 2.0}, {"window": 33, "soft_cap": 2.0}])
def test_windows_and_caps(facts: dict) -> None:
    check(spec_of(**facts))


@pytest.mark.parametrize(
    "heads, kv_heads, dim, v_dim", [(2, 2, 72, 72), (3, 1, 192, 128), (2, 1, 7, 5), (130, 1, 16, 16)]
)
def test_shapes_of_heads(heads: int, kv_heads: int, dim: int, v_dim: int) -> None:
    check(spec_of(heads, kv_heads, dim, v_head_dim=v_dim))


def test_with_the_tiles_of_a_device(tiles: str) -> None:
    check(spec_of(), torch.bfloat16)


def test_rows_of_no_req_give_zeros() -> None:
    check(spec_of(), padding=4)


def test_no_queries() -> None:
    none, keys = torch.randn(0, 3, 32), torch.randn(0, 1, 32)
    o, lse = attention.ragged(none, keys, keys, RaggedBatch.of([0, 0], [0, 0], CPU), spec_of(), lse=True)
    assert o.shape == (0, 3, 32)
    assert lse.shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 37])
def test_merge_is_the_body(dim: int, dtype: torch.dtype) -> None:
    """An empty side's values are NaN, and both sums may be large."""
    o_a, o_b = (torch.randn(11, 5, dim).to(dtype)[:, 1:4] for _ in range(2))
    lse_a, lse_b = (300 * torch.randn(11, 3) for _ in range(2))
    lse_b[4:] = lse_a[4:] + torch.randn(7, 3)
    lse_a[0], lse_b[1], lse_a[2], lse_b[2] = EMPTY, EMPTY, EMPTY, EMPTY
    o_a[0], o_b[1], o_a[2] = torch.nan, torch.nan, torch.nan
    got, lse = attention.merge(o_a, lse_a, o_b, lse_b)
    want, want_lse = OPS["attn.merge"].body(o_a, lse_a, o_b, lse_b)
    assert_close(got, want)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-5)
    assert not got[2].any()
