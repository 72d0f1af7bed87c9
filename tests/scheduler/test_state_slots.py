"""Which slots a req's states are read from and written to, and which of them others may start from."""

from __future__ import annotations

import pytest

from sglang_core.scheduler.state_slots import StateSlots, num_state_slots


def test_a_step_never_writes_what_it_reads_and_the_slot_before_is_used_again() -> None:
    slots = StateSlots([1, 2], page_size=100)
    steps = [slots.step(stop) for stop in range(1, 5)]
    assert steps == [(0, 2), (2, 1), (1, 2), (2, 1)]
    assert sorted(slots.owned) == [1, 2]


def test_the_state_at_a_page_end_is_kept_until_a_later_one_is_committed() -> None:
    slots = StateSlots([1, 2, 3], page_size=4)
    _, kept = slots.step(4)
    assert slots.snapshot(4) == [kept] and slots.snapshot(3) == slots.snapshot(8) == []
    written = [slots.step(stop)[1] for stop in (5, 6, 7)]
    assert kept not in written
    _, later = slots.step(8)
    slots.committed(7)
    assert slots.snapshot(4) == [kept] and slots.snapshot(8) == [], "token 8 may turn out void"
    slots.committed(8)
    assert slots.snapshot(8) == [later]
    assert kept in [slots.step(stop)[1] for stop in (9, 10)], "it makes way"


def test_what_the_tree_took_is_read_and_not_written() -> None:
    slots = StateSlots([1, 2, 3], page_size=4)
    _, given = slots.step(4)
    slots.share(given)
    slots.add(9)
    assert sorted(slots.owned) == sorted({1, 2, 3, 9} - {given})
    assert slots.step(5)[0] == given
    assert given not in [slots.step(stop)[1] for stop in (6, 7, 8, 9, 10)]


def test_a_req_begins_from_the_trees_state() -> None:
    slots = StateSlots([1, 2, 3], page_size=4, shared=7)
    assert slots.step(5)[0] == 7
    assert sorted(slots.owned) == [1, 2, 3]


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("page_size", [1, 2, 5])
@pytest.mark.parametrize("cached", [True, False])
def test_so_many_slots_are_enough(in_flight: int, page_size: int, cached: bool) -> None:
    count = num_state_slots(in_flight, cached=cached)
    slots = StateSlots(list(range(1, count + 1)), page_size, keep=cached)
    for stop in range(1, 60):
        read, write = slots.step(stop)
        assert read != write and write != 0
        slots.committed(max(0, stop - in_flight + 1))
    assert len(slots.owned) == count
