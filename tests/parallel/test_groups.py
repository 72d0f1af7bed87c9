from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_core.errors import ConfigError
from sglang_core.parallel.groups import (
    ParallelContext,
    aligned_shard,
    even_shard,
    padded_part,
    ragged_shard,
    shard_experts,
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


@given(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 4]), st.integers(1, 5))
def test_each_part_of_an_expert_is_held_once(ep_size: int, in_group: int, each: int) -> None:
    ranks, num_experts = ep_size * in_group, ep_size * each
    shards = [shard_experts(num_experts, ep_size, rank, ranks) for rank in range(ranks)]
    held = sorted((expert, shard.rank) for shard in shards for expert in shard.experts)
    assert held == [(expert, part) for expert in range(num_experts) for part in range(in_group)]
    assert {shard.num_ranks for shard in shards} == {in_group}


@pytest.mark.parametrize(("experts", "ep_size", "ranks"), [(8, 3, 4), (6, 4, 4), (8, 8, 4)])
def test_experts_that_cannot_be_dealt_name_the_sizes_that_can(experts: int, ep_size: int, ranks: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"ep_size={ep_size} does not divide tp_size={ranks} and the {experts} experts"
    ) as raised:
        shard_experts(experts, ep_size, 0, ranks)
    for size in map(int, str(raised.value).rsplit("--ep-size to ", 1)[1].split(" or ")):
        shard_experts(experts, size, ranks - 1, ranks)


def test_tp_groups_are_adjacent_ranks() -> None:
    assert [tuple(tp_ranks(rank, 2)) for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert (ParallelContext().tp_rank, ParallelContext().tp_size) == (0, 1)


def test_aligned_shards_are_cut_between_units_only() -> None:
    assert [aligned_shard(2880, r, 4, 32, "size") for r in range(4)] == [
        (0, 736),
        (736, 1472),
        (1472, 2176),
        (2176, 2880),
    ]
    assert [aligned_shard(300, r, 2, 128, "size") for r in range(2)] == [
        (0, 256),
        (256, 300),
    ]  # the last unit is a part
    assert aligned_shard(2880, 1, 2, 32, "size") == even_shard(2880, 1, 2, "size")
    for size, ranks, unit in [(2880, 8, 32), (768, 4, 128), (129, 2, 128)]:
        parts = [aligned_shard(size, r, ranks, unit, "size") for r in range(ranks)]
        assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])] and parts[-1][1] == size
        assert all(a % unit == 0 and a < b for a, b in parts)
    with pytest.raises(ConfigError, match="size=256 has 2 parts of 128 that share a scale, too few for tp_size=4"):
        aligned_shard(256, 0, 4, 128, "size")
    with pytest.raises(ConfigError, match="cannot be divided"):
        aligned_shard(10, 0, 4, 1, "size")
