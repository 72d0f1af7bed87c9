"""How reqs end: stop ids, lengths, stop strings, several tokens a step. Exactly one end each."""

from __future__ import annotations

import pytest

from sglang_core.types import FinishReason


def test_eos_ends_a_req_and_is_part_of_its_output(harness) -> None:
    h = harness()
    h.add("a", [1, 2], req={"eos_ids": frozenset({9})})
    h.step()
    h.step({"a": [9]})
    assert h.tokens("a") == [7, 9] and h.reason("a") == FinishReason("stop", matched=9)
    assert not h.scheduler.has_work


def test_ignored_eos_does_not_and_stop_token_ids_do(harness) -> None:
    h = harness()
    h.add("a", [1, 2], ignore_eos=True, stop_token_ids=(5,), req={"eos_ids": frozenset({9})})
    h.step({"a": [9]})
    h.step({"a": [5]})
    assert h.tokens("a") == [9, 5] and h.reason("a") == FinishReason("stop", matched=5)


def test_no_stop_id_counts_before_min_new_tokens(harness) -> None:
    h = harness()
    h.add("a", [1], min_new_tokens=2, req={"eos_ids": frozenset({9})})
    init = h.plan().plan.inits[0]
    assert init.stop_ids == [9], "the runner masks them until then"
    h = harness()
    h.add("a", [1], min_new_tokens=2, req={"eos_ids": frozenset({9})})
    for _ in range(3):
        h.step({"a": [9]})
    assert h.tokens("a") == [9, 9, 9] and h.reason("a").matched == 9


def test_a_stop_id_on_the_last_allowed_token_is_a_stop(harness) -> None:
    h = harness()
    h.add("a", [1], max_new_tokens=1, stop_token_ids=(9,))
    h.step({"a": [9]})
    assert h.reason("a") == FinishReason("stop", matched=9)


def test_max_new_tokens_zero_computes_the_prompt_and_gives_no_token(harness) -> None:
    h = harness(token_budget=4)
    h.add("a", list(range(10)), max_new_tokens=0)
    batches = h.run()
    assert len(batches) == 3 and not any(sample for b in batches for sample in b.plan.sample)
    assert h.tokens("a") == [] and h.reason("a").type == "length"


@pytest.mark.parametrize(
    ("row", "kept", "reason"),
    [
        ([5, 6, 9, 8], [5, 6, 9], FinishReason("stop", matched=9)),
        ([5, 6, 5, 6], [5, 6, 5], FinishReason("length")),
    ],
)
def test_of_several_tokens_a_step_those_past_the_end_are_dropped(harness, row, kept, reason) -> None:
    h = harness(tokens_per_step=4)
    h.add("a", [1, 2, 3], max_new_tokens=4, stop_token_ids=(9,))
    h.step()
    h.step({"a": row})
    assert h.tokens("a") == [7, *kept] and h.reason("a") == reason


def test_accepted_tokens_move_the_next_step_forward(harness, extends) -> None:
    h = harness(tokens_per_step=4)
    req = h.add("a", [1, 2, 3], max_new_tokens=50)
    h.step()
    batch = h.step({"a": [4, 5, 6]})
    assert extends(batch) == {"a": (3, 4)}
    assert req.committed_len == 6, "the KV of all but the newest token is there"
    assert extends(h.step()) == {"a": (6, 7)}


def test_a_stop_string_ends_a_req_at_its_token_count(harness) -> None:
    h = harness()
    req = h.add("a", [1, 2], max_new_tokens=50)
    for _ in range(4):
        h.step()
    [out] = h.keep(h.scheduler.finish_at("a", 2, "###"))
    assert out.token_ids == [] and out.finish_reason == FinishReason("stop", matched="###")
    assert req.output_ids == [7, 7]
    assert not h.scheduler.has_work and h.scheduler.finish_at("a", 2, "###") == []


def test_a_stop_string_may_end_a_req_whose_next_token_is_in_flight(harness) -> None:
    h = harness(max_in_flight=2)
    h.add("a", [1, 2], max_new_tokens=50)
    first, second = h.plan(), h.plan()
    h.answer(first)
    h.keep(h.scheduler.finish_at("a", 1, "x"))
    assert h.answer(second) == []
    assert h.reason("a").matched == "x" and h.tokens("a") == [7]
    assert h.scheduler.flush_cache() and h.allocator.num_free == h.allocator.num_usable
