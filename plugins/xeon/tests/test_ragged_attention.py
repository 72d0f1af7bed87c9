from __future__ import annotations

import pytest
import torch
from attention_cases import DTYPES, make_spec
from sglang_xeon import attention
from tolerance import assert_close

from sglang_core.api.ops import OPS, AttnSpec, RaggedBatch

LENGTHS = {  # (queries, keys) of each req
    "encoder": [(40, 40), (1, 1), (150, 150)],
    "more keys": [(5, 40), (64, 65), (1, 700)],
    "more queries": [(40, 5), (9, 0), (3, 3)],
    "empty": [(5, 5), (0, 0), (0, 9), (3, 3)],
}


def check(spec: AttnSpec, lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    num_q, num_k = (sum(n) for n in zip(*lengths, strict=True))
    q = torch.randn(num_q + 2, spec.num_heads, spec.head_dim).to(dtype)  # two tokens of no req
    # Keys and values side by side, as one projection gives them.
    kv = torch.randn(num_k, spec.num_kv_heads, spec.head_dim + spec.v_head_dim).to(dtype)
    k, v = kv.split([spec.head_dim, spec.v_head_dim], dim=-1)
    batch = RaggedBatch.of(*zip(*lengths, strict=True), q.device)
    want, want_lse = OPS["attn.ragged"].body(q, k, v, batch, spec, lse=True)
    got, got_lse = attention.ragged(q, k, v, batch, spec, lse=True)
    assert_close(got, want, scale=6.0)  # as attention_cases has it
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-4, atol=1e-4)
    assert torch.equal(attention.ragged(q, k, v, batch, spec), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "heads, kv_heads, dim, v_dim", [(4, 2, 64, 64), (3, 3, 80, 80), (4, 4, 192, 128), (2, 1, 72, 40)]
)
def test_ragged_is_the_body(
    level: str, dtype: torch.dtype, lengths: list, causal: bool, heads: int, kv_heads: int, dim: int, v_dim: int
) -> None:
    check(make_spec(heads, kv_heads, dim, v_dim, causal=causal), lengths, dtype)


@pytest.mark.parametrize("facts", [{"window": 9}, {"soft_cap": 2.0}])
def test_windows_and_caps_without_a_pool(level: str, facts: dict) -> None:
    for lengths in LENGTHS.values():
        check(make_spec(**facts), lengths, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, heads, dim", [(0, 2, 64), (7, 3, 64), (40, 2, 20)])
def test_merge_is_the_body(level: str, dtype: torch.dtype, tokens: int, heads: int, dim: int) -> None:
    o_a, o_b = torch.randn(2, tokens, heads, dim).to(dtype)
    lse_a, lse_b = 10 * torch.randn(2, tokens, heads)
    for row, sides in enumerate([(o_a,), (o_b,), (o_a, o_b)][:tokens]):
        for o in sides:  # an empty side, whose values mean nothing
            o[row] = torch.nan
            (lse_a if o is o_a else lse_b)[row] = -torch.inf
    want, want_lse = OPS["attn.merge"].body(o_a, lse_a, o_b, lse_b)
    got, got_lse = attention.merge(o_a, lse_a, o_b, lse_b)
    assert_close(got, want)
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-5, atol=1e-5)


def test_merged_halves_are_the_whole(level: str) -> None:
    spec = make_spec(causal=False)
    q, k, v = torch.randn(9, 4, 64), torch.randn(90, 2, 64), torch.randn(90, 2, 64)
    halves = []
    for keys in (slice(0, 90), slice(0, 31), slice(31, 90)):
        batch = RaggedBatch.of([9], [keys.stop - keys.start], q.device)
        halves.append(attention.ragged(q, k[keys], v[keys], batch, spec, lse=True))
    whole, first, second = halves
    for got, want in zip(attention.merge(*first, *second), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
