"""Steps in flight: ids that only the device knows, ends found late, and no step past a req's length."""

from __future__ import annotations

import pytest


def test_a_token_in_flight_is_planned_by_its_place_on_the_device(harness, extends) -> None:
    h = harness(max_in_flight=2)
    req = h.add("a", [1, 2, 3], max_new_tokens=10)
    first, second = h.plan(), h.plan()
    assert first.plan.token_ids == [1, 2, 3] and second.plan.token_ids == [-1]
    assert extends(second) == {"a": (3, 4)} and second.plan.mode == "decode"
    assert h.scheduler.schedule() is None
    assert (req.committed_len, req.reserved_len, req.num_in_flight) == (0, 4, 2)
    h.answer(first)
    assert (req.committed_len, req.reserved_len, req.num_in_flight) == (3, 4, 1)
    assert h.plan().plan.token_ids == [-1]
    h.answer(second, {"a": [8]})
    assert (req.committed_len, req.output_ids) == (4, [7, 8])


def test_known_ids_are_sent_where_nothing_is_in_flight(harness) -> None:
    h = harness(max_in_flight=1)
    h.add("a", [1, 2, 3], max_new_tokens=10)
    h.step({"a": [42]})
    assert h.step().plan.token_ids == [42]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nothing_is_planned_past_the_last_token(harness, depth: int) -> None:
    h = harness(max_in_flight=depth)
    h.add("a", [1, 2, 3], max_new_tokens=4)
    flight, rows = [], 0
    while h.scheduler.has_work:
        while (batch := h.scheduler.schedule()) is not None:
            flight.append(batch)
            rows += len(batch.reqs)
        h.answer(flight.pop(0))
    assert rows == 4 and len(h.tokens("a")) == 4


def test_an_end_found_late_voids_one_row_and_spares_its_neighbour(harness) -> None:
    h = harness(max_in_flight=2)
    h.add("a", [1], max_new_tokens=50, stop_token_ids=(9,))
    h.add("b", [2], max_new_tokens=5)
    first, second = h.plan(), h.plan()
    h.answer(first, {"a": [9]})
    third = h.plan()
    assert [req.rid for req in third.reqs] == ["b"]
    assert [out.rid for out in h.answer(second)] == ["b"]
    h.answer(third)
    assert h.tokens("a") == [9] and h.reason("a").matched == 9


def test_results_out_of_order_are_a_bug(harness) -> None:
    h = harness(max_in_flight=2)
    h.add("a", [1], max_new_tokens=50)
    _, second = h.plan(), h.plan()
    with pytest.raises(AssertionError, match="order"):
        h.answer(second)


def test_has_work_until_void_rows_are_processed(harness) -> None:
    h = harness(max_in_flight=2)
    h.add("a", [1], max_new_tokens=50)
    batch = h.plan()
    h.scheduler.abort("a")
    assert h.scheduler.has_work and h.scheduler.num_running == 0
    h.answer(batch)
    assert not h.scheduler.has_work
