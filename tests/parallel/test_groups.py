from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_core.errors import ConfigError
from sglang_core.parallel.groups import (
    ParallelContext,
    even_shard,
    padded_part,
    ragged_shard,
    shard_heads,
    tp_ranks,
)


@given(st.integers(1, 200), st.integers(1, 9))
def test_ragged_shards_cover_once_and_no_part_exceeds_the_padded_one(size: int, ranks: int) -> None:
    parts = [ragged_shard(size, rank, ranks) for rank in range(ranks)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(size))
    assert max(stop - start for start, stop in parts) == padded_part(size, ranks)


def test_even_shard_names_the_way_out() -> None:
    assert even_shard(12, 1, 3, "intermediate_size") == (4, 8)
    with pytest.raises(ConfigError, match=r"intermediate_size=10 .*tp_size=4.*--tp-size to a divisor of 10"):
        even_shard(10, 0, 4, "intermediate_size")


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_each_query_head_sits_with_its_kv_head(group_pow: int, kv_pow: int, tp_pow: int) -> None:
    kv, ranks = 2**kv_pow, 2**tp_pow
    heads = kv * 2**group_pow
    if heads % ranks:
        return
    shards = [shard_heads(heads, kv, rank, ranks) for rank in range(ranks)]
    assert [h for s in shards for h in range(*s.q)] == list(range(heads))
    for s in shards:
        local_group = s.num_heads // s.num_kv_heads
        for local, head in enumerate(range(*s.q)):
            assert s.kv[0] + local // local_group == head // (heads // kv)


@pytest.mark.parametrize(("heads", "kv", "ranks"), [(6, 2, 4), (12, 3, 2), (12, 3, 4)])
def test_heads_that_do_not_divide_name_the_sizes_that_do(heads: int, kv: int, ranks: int) -> None:
    with pytest.raises(ConfigError, match=r"set --tp-size to one of 1, ") as raised:
        shard_heads(heads, kv, 0, ranks)
    for size in map(int, str(raised.value).rsplit("one of ", 1)[1].split(", ")):
        shard_heads(heads, kv, size - 1, size)


def test_tp_groups_are_adjacent_ranks() -> None:
    assert [tuple(tp_ranks(rank, 2)) for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert (ParallelContext().tp_rank, ParallelContext().tp_size) == (0, 1)
