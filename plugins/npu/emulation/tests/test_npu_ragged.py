"""attn.ragged against its body: which reqs share a call, and what the vendor's op is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang_npu import graphs, ragged
from sglang_npu_emulation.contract import watched

from sglang_core.api.ops import OPS, AttnSpec, RaggedBatch

CPU = torch.device("cpu")
Reqs = list[tuple[int, int]]  # (queries, keys) each
SQUARE: Reqs = [(40, 40), (1, 1), (0, 0), (15, 15)]
LENS: dict[str, Reqs] = {
    "square": SQUARE,
    "more keys": [(5, 40), (1, 90), (0, 7), (15, 16)],
    "more queries": [(5, 5), (40, 5), (1, 3), (4, 0), (3, 3)],
    "no keys": [(4, 0), (0, 0)],
    "nothing": [(0, 0)],
}
HEADS = {  # query heads, heads of keys, dims of keys and of values, dtype
    "of DeepSeek": (4, 4, 192, 128, torch.bfloat16),
    "narrow": (4, 2, 72, 40, torch.bfloat16),
    "wide values": (2, 2, 72, 160, torch.bfloat16),
    "half": (4, 2, 72, 40, torch.float16),
    "wide": (2, 1, 200, 200, torch.bfloat16),
}


def spec_of(heads: int, kv_heads: int, dim: int, v_dim: int, **facts: Any) -> AttnSpec:
    return AttnSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim, scale=0.1, **facts)


def batch_of(lens: Reqs) -> RaggedBatch:
    return RaggedBatch.of([n for n, _ in lens], [n for _, n in lens], CPU)


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS)
@pytest.mark.parametrize("facts", [{}, {"causal": False}, {"window": 1}, {"window": 9}], ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_it_is_the_op(heads: tuple[Any, ...], facts: dict[str, Any], lens: Reqs) -> None:
    *shape, dtype = heads
    spec, batch = spec_of(*shape, **facts), batch_of(lens)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(int(batch.cu_q[-1]) + 2, spec.num_heads, spec.head_dim, generator=generator).to(dtype)
    q[-2:] = torch.nan  # of no req
    wide = torch.randn(int(batch.cu_k[-1]), spec.num_kv_heads, spec.head_dim + spec.v_head_dim, generator=generator)
    k, v = wide.to(dtype).split([spec.head_dim, spec.v_head_dim], dim=-1)
    want, want_lse = OPS["attn.ragged"].body(q, k, v, batch, spec, lse=True)
    with watched() as calls:
        got, lse = ragged.ragged(q, k, v, batch, spec, lse=True)
        again = ragged.ragged(q, k, v, batch, spec)
    torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, got)
    alone = dtype is torch.float16 or spec.head_dim > 192
    with_keys = sum(queries > 0 < keys for queries, keys in lens)
    if alone:
        assert calls.total() == 2 * with_keys
    elif lens is SQUARE:
        assert calls.total() == 2


def ends(lens: Reqs, spec: AttnSpec, *, packed: bool = True) -> list[tuple[list[int], list[int]]]:
    return [(run.q_ends, run.k_ends) for run in ragged.runs(batch_of(lens), spec, packed=packed)]


def test_queries_that_see_no_key_part_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    causal, encoder = (spec_of(4, 4, 128, 128, causal=causal) for causal in (True, False))
    assert ends(SQUARE, causal) == [([40, 41, 56], [40, 41, 56])]
    assert ends([(2, 2), (5, 3), (1, 4)], causal) == [([2], [2]), ([3, 4], [3, 7])]
    assert ends([(2, 2), (5, 3), (1, 4)], encoder) == [([2, 7, 8], [2, 5, 9])]
    assert ends([(2, 2), (5, 0), (1, 4)], encoder) == [([2], [2]), ([1], [4])]
    assert ends([(2, 2), (1, 4)], causal, packed=False) == [([2], [2]), ([1], [4])]
    monkeypatch.setattr(ragged, "MOST_PACKED", 2)
    assert ends([(1, 1)] * 5, causal) == [([1, 2], [1, 2])] * 2 + [([1], [1])]


def test_a_query_alone_is_given_the_keys_of_its_window_only() -> None:
    spec = spec_of(4, 4, 128, 128, window=3)
    assert ends([(1, 9), (4, 9)], spec, packed=False) == [([1], [3]), ([4], [6])]


def test_it_is_not_captured() -> None:
    with graphs.noted(), pytest.raises(RuntimeError, match=r"attn\.ragged.*depends on the lengths"):
        ragged.ragged(*torch.zeros(3, 1, 1, 128).bfloat16(), batch_of([(1, 1)]), spec_of(1, 1, 128, 128))
