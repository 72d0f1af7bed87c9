"""A prefix that many reqs share is computed once, and nobody waits for ever."""

from __future__ import annotations

import pytest

SHARED = list(range(1024))


def computed_tokens(batches) -> int:
    return sum(sum(batch.plan.extend_lens) for batch in batches if batch.plan.mode != "decode")


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("budget", [100, 1000, 8192])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_thirty_two_reqs_at_once_compute_their_shared_prompt_once(harness, page_size, budget, depth) -> None:
    h = harness(
        num_pages=1 + 8000 // page_size,
        page_size=page_size,
        token_budget=budget,
        max_in_flight=depth,
        max_running=40,
        context_length=4096,
    )
    for i in range(32):
        h.add(str(i), [*SHARED, *[5000 + i] * 20], max_new_tokens=2)
    flight, plans = [], []
    while h.scheduler.has_work:
        while (batch := h.scheduler.schedule()) is not None:
            flight.append(batch)
            plans.append(batch)
        h.answer(flight.pop(0))
    assert h.scheduler.stats()["cached_tokens"] >= 31 * 1024
    total = sum(sum(batch.plan.extend_lens) for batch in plans)
    assert total == 1024 + 32 * 20 + 32, "prompts, and one decode each"


def test_a_short_shared_part_is_not_worth_a_wait(harness, extends) -> None:
    h = harness(prefix_wait_tokens=32)
    h.add("a", [*range(20), 100])
    h.add("b", [*range(20), 200])
    assert set(extends(h.step())) == {"a", "b"}


def test_namespaces_do_not_wait_for_each_other(harness, extends) -> None:
    h = harness(token_budget=500)
    h.add("a", list(range(100)), req={"namespace": ("x",)})
    h.add("b", list(range(100)), req={"namespace": ("y",)})
    assert set(extends(h.step())) == {"a", "b"}


def test_without_a_cache_nobody_waits(harness, extends) -> None:
    h = harness(token_budget=500, cached=False)
    h.add("a", list(range(100)))
    h.add("b", list(range(100)))
    assert set(extends(h.step())) == {"a", "b"}


def test_a_req_that_wants_those_logprobs_computes_them_itself(harness, extends) -> None:
    h = harness(token_budget=500)
    h.add("a", list(range(100)))
    h.add("b", list(range(100)), logprob_start_len=0)
    assert set(extends(h.step())) == {"a", "b"}


def test_others_pass_a_req_that_waits(harness, extends) -> None:
    h = harness(token_budget=50, policy="fcfs")
    h.add("a", list(range(120)))
    h.add("b", list(range(120)))
    h.add("c", [9] * 10)
    steps = [extends(h.step()) for _ in range(4)]
    assert [sorted(step) for step in steps] == [["a"], ["a"], ["a", "c"], ["a", "b", "c"]]
    assert steps[3]["b"] == (116, 120)


def test_when_the_computing_req_is_aborted_the_next_takes_over_where_it_was(harness, extends) -> None:
    h = harness(token_budget=50)
    for rid in "abc":
        h.add(rid, [*range(200), ord(rid)], max_new_tokens=2)
    h.step()
    h.keep(h.scheduler.abort("a"))
    batch = h.step()
    assert extends(batch) == {"b": (48, 98)}, "its committed pages were kept; the third still waits"
    h.run()
    assert len(h.tokens("b")) == len(h.tokens("c")) == 2
    assert h.scheduler.stats()["cached_tokens"] == 48 + 200


def test_a_wait_ends_with_the_shared_part_and_not_with_the_others_prompt(harness, extends) -> None:
    h = harness(token_budget=100, max_in_flight=2)
    h.add("a", [*range(100), *[7] * 50])
    h.add("b", [*range(100), *[8] * 50])
    first, second = h.plan(), h.plan()
    assert (extends(first), extends(second)) == ({"a": (0, 100)}, {"a": (100, 150)}), "b waits, with budget left"
    h.answer(first)
    assert extends(h.plan()) == {"a": (150, 151), "b": (100, 150)}, "while the rest of a's prompt is in flight"
