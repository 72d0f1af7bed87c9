"""The token budget of a step, chunks, mixed steps, and what input logprobs ask of both."""

from __future__ import annotations

import pytest


def test_a_long_prompt_is_cut_to_the_budget_and_only_its_end_samples(harness, extends) -> None:
    h = harness(token_budget=10)
    h.add("a", list(range(25)), max_new_tokens=1)
    batches = h.run()
    assert [extends(b)["a"] for b in batches] == [(0, 10), (10, 20), (20, 25)]
    assert [b.plan.sample for b in batches] == [[False], [False], [True]]
    assert [b.plan.token_ids for b in batches] == [list(range(10)), list(range(10, 20)), list(range(20, 25))]


def test_chunks_go_back_to_back_without_waiting_for_results(harness, extends) -> None:
    h = harness(token_budget=10, max_in_flight=3)
    h.add("a", list(range(25)))
    assert [extends(h.plan())["a"] for _ in range(3)] == [(0, 10), (10, 20), (20, 25)]
    assert h.scheduler.schedule() is None, "three are in flight"


def test_decodes_are_always_in_and_prefills_share_what_they_leave(harness, extends) -> None:
    h = harness(token_budget=10)
    h.add("a", [1, 2], max_new_tokens=50)
    h.add("b", [3, 4], max_new_tokens=50)
    assert h.step().plan.mode == "prefill"
    assert h.step().plan.mode == "decode"
    h.add("c", list(range(100, 120)))
    batch = h.step()
    assert batch.plan.mode == "mixed" and extends(batch) == {"a": (3, 4), "b": (3, 4), "c": (0, 8)}
    assert batch.plan.sample == [True, True, False]


def test_the_budget_bounds_the_batch_too(harness) -> None:
    h = harness(token_budget=2, max_running=4)
    for i in range(4):
        h.add(str(i), [i], max_new_tokens=20)
    assert max(sum(batch.plan.extend_lens) for batch in h.run()) == 2
    assert all(len(h.tokens(str(i))) == 20 for i in range(4))


def test_unchunked_prompts_run_whole_and_one_over_the_budget_alone(harness, extends) -> None:
    h = harness(token_budget=10, chunked=False)
    for rid, n in (("a", 6), ("b", 6), ("c", 30)):
        h.add(rid, [ord(rid)] * n, max_new_tokens=3)
    assert extends(h.step()) == {"a": (0, 6)}
    assert extends(h.step()) == {"a": (6, 7), "b": (0, 6)}
    assert extends(h.step()) == {"a": (7, 8), "b": (6, 7), "c": (0, 30)}


def test_one_token_is_always_left_to_compute(harness, extends) -> None:
    h = harness(page_size=4)
    for rid in "ab":
        h.add(rid, list(range(8)), max_new_tokens=1)
        batch = h.step()
    assert extends(batch) == {"b": (4, 8)}


@pytest.mark.parametrize(("start", "cached"), [(-1, 12), (9, 8), (8, 4), (1, 0), (0, 0), (13, 12)])
def test_the_cached_prefix_stops_where_logprobs_are_wanted(harness, extends, start: int, cached: int) -> None:
    h = harness(page_size=4)
    h.add("a", list(range(16)), max_new_tokens=1)
    h.step()
    req = h.add("b", list(range(15)), logprob_start_len=start, max_new_tokens=1)
    batch = h.step()
    assert extends(batch)["b"][0] == req.num_cached_tokens == cached
    assert batch.plan.logprob_starts == ([start] if start >= 0 else [])


@pytest.mark.parametrize("start", [0, 1, 5, 11, 12])
@pytest.mark.parametrize("budget", [2, 3, 5, 64])
@pytest.mark.parametrize("depth", [1, 2])
def test_each_input_logprob_is_asked_for_once_in_an_extend_that_can_give_it(
    harness, extends, logprob_positions, start: int, budget: int, depth: int
) -> None:
    h = harness(token_budget=budget, max_in_flight=depth)
    h.add("a", list(range(12)), logprob_start_len=start, max_new_tokens=3)
    asked: list[int] = []
    flight = []
    while h.scheduler.has_work:
        while (batch := h.scheduler.schedule()) is not None:
            flight.append(batch)
            positions = logprob_positions(batch)["a"]
            begin, _ = extends(batch)["a"]
            assert all(p == 0 or p - 1 >= begin for p in positions), "the hidden state before it is in this extend"
            asked += positions
        h.answer(flight.pop(0))
    assert asked == list(range(start, 12))
    first_output = h.outputs["a"][0]
    assert first_output.token_ids == [7], "they come with the first token"
    assert [entry.token_id for entry in first_output.input_logprobs] == asked
    assert not any(out.input_logprobs for out in h.outputs["a"][1:])
