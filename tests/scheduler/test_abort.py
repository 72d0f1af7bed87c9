"""A req can be aborted at any point of its life, once, and leaves nothing behind."""

from __future__ import annotations

import pytest


def assert_nothing_left(h) -> None:
    assert not h.scheduler.has_work
    assert h.scheduler.flush_cache() and h.allocator.num_free == h.allocator.num_usable


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_while_waiting_in_a_chunk_or_decoding(harness, steps: int) -> None:
    h = harness(token_budget=4)
    h.add("a", list(range(10)), max_new_tokens=50)
    for _ in range(steps):
        h.step()
    h.keep(h.scheduler.abort("a"))
    assert h.reason("a").type == "abort"
    assert_nothing_left(h)
    assert h.scheduler.abort("a") == []


def test_with_steps_in_flight_whose_rows_are_void(harness) -> None:
    h = harness(max_in_flight=2)
    h.add("a", [1, 2], max_new_tokens=50)
    h.add("b", [3, 4], max_new_tokens=3)
    flight = [h.plan(), h.plan()]
    h.keep(h.scheduler.abort("a"))
    h.add("c", [5, 6], max_new_tokens=2)  # takes over slot and pages of a
    for batch in flight:
        assert {out.rid for out in h.answer(batch)} == {"b"}
    h.run()
    assert (h.tokens("a"), h.tokens("b"), h.tokens("c")) == ([], [7] * 3, [7] * 2)
    assert_nothing_left(h)


def test_rids_match_exactly_and_an_empty_one_means_all(harness) -> None:
    h = harness(max_running=1)
    for rid in ("a", "ab", "b"):
        h.add(rid, [1])
    h.step()
    assert [out.rid for out in h.keep(h.scheduler.abort("a"))] == ["a"]
    assert {out.rid for out in h.keep(h.scheduler.abort(""))} == {"ab", "b"}
    assert_nothing_left(h)


def test_a_rid_may_come_again_while_its_void_row_is_in_flight(harness) -> None:
    h = harness(max_in_flight=2)
    h.add("a", [1, 2], max_new_tokens=2)
    void = h.plan()
    h.scheduler.abort("a")
    h.add("a", [3, 4, 5], max_new_tokens=2)
    again = h.plan()
    assert h.answer(void) == []
    h.answer(again)
    h.run()
    assert h.tokens("a") == [7, 7] and h.reason("a").type == "length"


def test_a_held_req_can_be_aborted(harness) -> None:
    h = harness()
    h.add("a", [1], req={"holds": {"grammar"}})
    assert h.scheduler.schedule() is None
    h.keep(h.scheduler.abort("a"))
    assert h.reason("a").type == "abort"
    assert_nothing_left(h)
