from __future__ import annotations

from pathlib import Path

import pytest
from sglang_xeon.topology import (
    Topology,
    compact,
    group_cores,
    home_node,
    parse_cpulist,
    parse_quota,
    place,
    read_topology,
)

# Two sockets of four cores with two hardware threads: 0-7 first threads, 8-15 their siblings.
CORES = group_cores({cpu: cpu % 8 for cpu in range(16)})
NODES = (frozenset({0, 1, 2, 3, 8, 9, 10, 11}), frozenset({4, 5, 6, 7, 12, 13, 14, 15}))
TWO_SOCKETS = Topology(cores=CORES, nodes=NODES)


def test_one_rank_takes_the_physical_cores_of_one_node() -> None:
    assert place(TWO_SOCKETS) == [0, 1, 2, 3]


def test_two_ranks_take_a_node_each() -> None:
    assert place(TWO_SOCKETS, rank=0, world_size=2) == [0, 1, 2, 3]
    assert place(TWO_SOCKETS, rank=1, world_size=2) == [4, 5, 6, 7]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_never_share_a_core(world_size: int) -> None:
    taken = [cpu for rank in range(world_size) for cpu in place(TWO_SOCKETS, rank=rank, world_size=world_size)]
    assert len(taken) == len(set(taken))


def test_asked_for_threads_span_nodes_then_siblings() -> None:
    assert place(TWO_SOCKETS, num_threads=6) == [0, 1, 2, 3, 4, 5]
    assert place(TWO_SOCKETS, num_threads=9) == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_the_larger_part_of_an_affinity_mask_wins() -> None:
    cores = group_cores({cpu: cpu % 8 for cpu in (3, 4, 5, 6)})
    nodes = (NODES[0] & {3}, NODES[1] & {4, 5, 6})
    assert place(Topology(cores=cores, nodes=nodes)) == [4, 5, 6]


def test_a_quota_limits_threads() -> None:
    assert len(place(Topology(cores=CORES, nodes=NODES, quota=2.5))) == 3
    assert len(place(Topology(cores=CORES, nodes=NODES, quota=0.5))) == 1


def test_more_ranks_than_cores_still_get_one_each() -> None:
    one = Topology(cores=((0,),), nodes=(frozenset({0}),))
    assert [place(one, rank=r, world_size=3) for r in range(3)] == [[0], [0], [0]]


def test_lists_and_quotas_as_the_kernel_writes_them() -> None:
    assert parse_cpulist("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert parse_cpulist("") == set()
    assert parse_quota("250000 100000\n") == 2.5
    assert parse_quota("max 100000\n") is None
    assert parse_quota("") is None
    assert compact([5, 0, 1, 2]) == "0-2,5"


def test_a_machine_that_says_nothing_is_one_node_of_single_cores(tmp_path: Path) -> None:
    topology = read_topology(str(tmp_path))
    assert len(topology.nodes) == 1
    assert all(len(core) == 1 for core in topology.cores)
    assert place(topology)


def test_a_rank_is_at_home_on_its_node_where_there_are_several() -> None:
    assert home_node(TWO_SOCKETS, [4, 5]) == NODES[1]
    assert home_node(TWO_SOCKETS, [3, 4]) is None  # spans both
    one = Topology(cores=CORES, nodes=(NODES[0] | NODES[1],))
    assert home_node(one, [0, 1]) is None
