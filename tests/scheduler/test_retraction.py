"""When pages run out: who goes back to waiting, that everyone still ends, and what admission learns from it."""

from __future__ import annotations

from sglang_core.scheduler.reserve import OutputReserve
from sglang_core.scheduler.retraction import MAX_RETRACTIONS, retraction_order
from sglang_core.types import Req, SamplingParams

TIGHT = {"num_pages": 1 + 12, "page_size": 4, "output_reserve": 0.0}  # 48 tokens of KV


def test_the_newest_goes_and_comes_back_with_its_tokens(harness, extends) -> None:
    h = harness(**TIGHT)
    a = h.add("a", [1] * 15, max_new_tokens=30)
    b = h.add("b", [2] * 15, max_new_tokens=30)
    while not b.num_retractions:
        h.step()
    had = list(b.output_ids)
    assert (b.slot, b.pages, b.status.value, h.scheduler.num_waiting) == (-1, {}, "waiting", 1)
    while h.scheduler.num_waiting:
        h.step()
    assert b.output_ids[: len(had)] == had and a.num_retractions == 0
    h.run()
    assert len(h.tokens("a")) == len(h.tokens("b")) == 30
    assert h.scheduler.stats()["retractions"] == b.num_retractions >= 1


def test_what_it_had_computed_is_found_in_the_tree_again(harness, extends) -> None:
    h = harness(num_pages=1 + 20, page_size=4, output_reserve=0.0)
    h.add("a", [1] * 30, max_new_tokens=16)
    b = h.add("b", [2] * 30, max_new_tokens=16)
    while not b.num_retractions:
        h.step()
    h.keep(h.scheduler.abort("a"))
    num_tokens = b.num_tokens
    start, stop = extends(h.step())["b"]
    assert stop == num_tokens and start >= 28, "all but the pages that were needed at once"
    assert b.num_cached_tokens == 0, "usage counts what was cached when it first started"


def test_the_pipeline_drains_before_anyone_is_retracted(harness) -> None:
    """A req that is about to end may free the pages that seem to be missing."""
    h = harness(num_pages=1 + 8, page_size=4, output_reserve=0.0, max_in_flight=2)
    h.add("a", [1] * 15, max_new_tokens=20, stop_token_ids=(9,))
    b = h.add("b", [2] * 15, max_new_tokens=8)
    flight = [h.plan(), h.plan()]
    while (batch := h.scheduler.schedule() if len(flight) < 2 else None) is not None or len(flight) == 2:
        if batch is not None:
            flight.append(batch)
        h.answer(flight.pop(0))
    h.answer(flight.pop(0), {"a": [9]})
    assert h.reason("a").type == "stop"
    h.run()
    assert b.num_retractions == 0 and len(h.tokens("b")) == 8


def test_one_req_alone_can_use_every_page(harness) -> None:
    h = harness(num_pages=1 + 6, page_size=4)
    h.add("warm", [5] * 20, max_new_tokens=2)
    h.run()
    a = h.add("a", [1] * 9, max_new_tokens=100)
    h.run()
    assert a.num_tokens == 25 and h.scheduler.stats()["retractions"] == 0


def test_order_is_lowest_priority_then_newest_and_often_retracted_ones_last() -> None:
    def req(rid: str, priority: int, arrival: float, retractions: int = 0) -> Req:
        made = Req(rid=rid, input_ids=[1], sampling=SamplingParams(), priority=priority, num_retractions=retractions)
        made.arrival = arrival
        return made

    running = [req("old", 0, 1), req("new", 0, 2), req("low", -1, 0), req("tired", -1, 3, MAX_RETRACTIONS)]
    assert [r.rid for r in retraction_order(running)] == ["low", "new", "old", "tired"]


def test_retracted_reqs_return_to_the_place_of_their_arrival(harness) -> None:
    h = harness(**TIGHT, policy="fcfs", max_running=2)
    h.add("a", [1] * 15, max_new_tokens=30)
    b = h.add("b", [2] * 15, max_new_tokens=30)
    h.step()
    h.add("c", [3], max_new_tokens=1)
    while not b.num_retractions:
        h.step()
    entered = [
        req.rid
        for batch in h.run()
        for req, slot in zip(batch.reqs, batch.plan.slots, strict=True)
        if slot in {init.slot for init in batch.plan.inits}
    ]
    assert entered == ["b", "c"]


def test_nobody_starts_on_the_pages_of_a_req_just_retracted(harness) -> None:
    h = harness(**TIGHT, policy="priority", max_running=2)
    h.add("a", [1] * 15, max_new_tokens=30)
    b = h.add("b", [2] * 15, max_new_tokens=30)
    h.step()
    h.add("c", [3], max_new_tokens=1, req={"priority": 1})
    while not b.num_retractions:
        batch = h.step()
    assert [req.rid for req in batch.reqs] == ["a"]
    assert "c" in [req.rid for req in h.step().reqs]


def test_admission_learns_from_a_retraction(harness) -> None:
    h = harness(**TIGHT)
    h.add("a", [1] * 15, max_new_tokens=30)
    h.add("b", [2] * 15, max_new_tokens=30)
    before = h.scheduler.stats()["output_reserve"]
    while not h.scheduler.stats()["retractions"]:
        h.step()
    assert h.scheduler.stats()["output_reserve"] > before


def test_who_waits_for_a_retracted_reqs_prefix_takes_over(harness) -> None:
    h = harness(num_pages=1 + 18, page_size=4, output_reserve=0.0, token_budget=3, policy="fcfs", prefix_wait_tokens=8)
    for rid in ("a1", "a2"):
        h.add(rid, [ord(rid[1])] * 3, max_new_tokens=20)
    while "a2" not in h.outputs:
        h.step()
    # its second chunk would hold two tokens, one of them computed again for logprobs; the budget has room for one
    b = h.add("b", list(range(40)), logprob_start_len=0, max_new_tokens=1)
    h.add("c", list(range(41)), max_new_tokens=1)
    while not b.num_retractions:
        h.step()
    b.holds.add("tier_load")
    while "c" not in h.outputs:
        h.step()
    h.scheduler.release_hold("b", "tier_load")
    h.run()
    assert h.reason("b").type == h.reason("c").type == "length"


def test_the_reserve_keeps_a_req_out_that_would_soon_be_retracted(harness) -> None:
    h = harness(**(TIGHT | {"output_reserve": 1.0}))
    h.add("a", [1] * 15, max_new_tokens=30)
    h.add("b", [2] * 15, max_new_tokens=30)
    assert len(h.step().reqs) == 1
    h.run()
    assert h.scheduler.stats()["retractions"] == 0


def test_the_reserve_falls_slowly_and_rises_by_jumps() -> None:
    reserve = OutputReserve(0.7)
    for _ in range(10_000):
        reserve.step()
    assert abs(reserve.ratio - 0.1) < 1e-9
    reserve.retracted()
    assert abs(reserve.ratio - 0.35) < 1e-9
    for _ in range(9):
        reserve.retracted()
    assert reserve.ratio == 1.0


def test_input_logprobs_half_computed_are_computed_anew_after_retraction(harness) -> None:
    """They come with the first token, so a req retracted before that has given none to the client."""
    h = harness(num_pages=1 + 18, page_size=4, output_reserve=0.0, token_budget=6)
    h.add("a", [1] * 4, max_new_tokens=40)
    b = h.add("b", list(range(60)), logprob_start_len=0, max_new_tokens=1)
    while not b.num_retractions:
        h.step()
    assert "b" not in h.outputs
    h.run()
    [out] = h.outputs["b"]
    assert [entry.token_id for entry in out.input_logprobs] == list(range(60))
