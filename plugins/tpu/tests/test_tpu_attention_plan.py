"""The items of a plan: together they are every query of a step, each with the pages of its keys, in a bucket's room."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sglang_tpu.attention_plan import (
    BLOCK,
    END_KEY,
    END_PAGE,
    END_ROW,
    FIELDS,
    FIRST_PAGE,
    FIRST_ROW,
    POSITION,
    REQ,
    block_tokens,
    plan,
)

from sglang_core.api.ops import AttnBatch, AttnSpec

CPU = torch.device("cpu")
PAGE = 16


def spec_of(heads: int = 8, kv_heads: int = 2, **more: Any) -> AttnSpec:
    return AttnSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=64, v_head_dim=64, scale=1.0, **more)


def batch_of(reqs: list[tuple[int, int]], num_tokens: int, num_reqs: int, max_extend: int) -> AttnBatch:
    """A bucket with these (prefix, extend) in it."""
    padding = num_reqs - len(reqs)
    extends = torch.tensor([0, *(e for _, e in reqs), *[0] * padding])
    prefix_lens = torch.tensor([p for p, _ in reqs] + [0] * padding, dtype=torch.int32)
    return AttnBatch(
        cu_extend_cpu=extends.cumsum(0).int(),
        prefix_lens_cpu=prefix_lens,
        seq_lens_cpu=prefix_lens + extends[1:].int(),
        page_table_cpu=torch.zeros(num_reqs, 64, dtype=torch.int32),
        slot_mapping_cpu=torch.zeros(num_tokens, dtype=torch.int32),
        num_tokens=num_tokens,
        num_reqs=num_reqs,
        max_extend=max_extend,
        num_pages=64,
        page_size=PAGE,
        static=True,
    )


def ranges(spec: AttnSpec, batch: AttnBatch) -> tuple[dict[int, tuple[int, int, int]], int]:
    """token -> (its req, its place, the first key of its item's pages); and how many items there are."""
    made = plan(spec, batch, CPU)
    count, block = int(made.count), made.static.block
    items = made.items.view(-1, len(FIELDS)).tolist()
    found = {}
    last = 0
    for item in items[:count]:
        assert item[BLOCK] >= last, "items of one block must follow one another"
        last = item[BLOCK]
        for row in range(item[FIRST_ROW], item[END_ROW]):
            place = item[POSITION] + row
            assert (place < item[END_KEY]) if spec.causal else True
            assert item[END_PAGE] == -(-item[END_KEY] // PAGE)
            token = item[BLOCK] * block + row
            assert token not in found
            found[token] = item[REQ], place, item[FIRST_PAGE] * PAGE
    assert all(not any(rest) for rest in items[count:])
    return found, count


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("seed", range(6))
def test_every_query_is_in_one_item_with_its_keys(seed: int, window: int | None) -> None:
    rng = np.random.default_rng(seed)
    spec = spec_of(window=window)
    reqs = [(int(rng.integers(0, 300)), int(rng.integers(0, 90))) for _ in range(rng.integers(1, 7))]
    batch = batch_of(reqs, num_tokens=max(1, sum(e for _, e in reqs)) + 5, num_reqs=8, max_extend=128)
    found, _ = ranges(spec, batch)
    token = 0
    for r, (prefix, extend) in enumerate(reqs):
        for i in range(extend):
            req, place, first_key = found.pop(token)
            assert (req, place) == (r, prefix + i)
            assert first_key <= max(0, place - (window or 10**6) + 1)
            token += 1
    assert not found


def test_decode_has_one_item_a_req_and_padding_none() -> None:
    found, count = ranges(spec_of(), batch_of([(5, 1), (0, 1), (700, 1)], num_tokens=8, num_reqs=8, max_extend=1))
    assert count == len(found) == 3


def test_a_bucket_of_padding_alone_has_one_item_without_rows() -> None:
    found, count = ranges(spec_of(), batch_of([], num_tokens=16, num_reqs=4, max_extend=16))
    assert not found and count == 1


def test_items_begin_at_the_window() -> None:
    """Pages before it may be another req's by now."""
    made = plan(spec_of(window=20), batch_of([(500, 1)], num_tokens=1, num_reqs=1, max_extend=1), CPU)
    assert int(made.items[FIRST_PAGE]) == (500 - 19) // PAGE


def test_plans_of_a_bucket_have_the_same_shapes_and_fill_each_other() -> None:
    spec = spec_of()
    one, other = (
        plan(spec, batch_of(reqs, num_tokens=64, num_reqs=8, max_extend=64), CPU)
        for reqs in ([(3, 1)] * 8, [(0, 30), (9, 34)])
    )
    assert one.static == other.static
    assert [x.shape for x in one.buffers()] == [x.shape for x in other.buffers()]
    expected = [x.clone() for x in other.buffers()]
    filled = plan(spec, batch_of([(0, 30), (9, 34)], num_tokens=64, num_reqs=8, max_extend=64), CPU, one)
    assert filled is one and all(x.equal(y) for x, y in zip(one.buffers(), expected, strict=True))


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (4, 1), (64, 64), (128, 1), (6, 3)])
def test_blocks_fit_vmem_and_are_powers_of_two(heads: int, kv_heads: int) -> None:
    spec = spec_of(heads, kv_heads)
    blocks = [block_tokens(spec, n) for n in (1, 5, 16, 2048)]
    assert blocks[0] == 1 and all(b & (b - 1) == 0 for b in blocks)
    assert all(b * heads <= 4096 and b * heads // kv_heads <= 512 for b in blocks)
