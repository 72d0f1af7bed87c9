"""What is refused at once, with numbers, and what is settled on arrival."""

from __future__ import annotations

import pytest

from sglang_core.errors import ConfigError, QueueFullError, RequestError
from sglang_core.scheduler import SchedulerConfig


def test_a_prompt_as_long_as_the_context_is_refused_with_the_numbers(harness) -> None:
    h = harness(context_length=20)
    with pytest.raises(RequestError, match=r"20 tokens.*at most 19.*--context-length") as caught:
        h.add("a", [1] * 20)
    assert caught.value.code == "context_length_exceeded"
    h.add("b", [1] * 19, max_new_tokens=100)
    h.run()
    assert len(h.tokens("b")) == 1 and h.reason("b").type == "length"


def test_a_prompt_larger_than_the_pool_is_refused_and_one_as_large_runs(harness) -> None:
    h = harness(num_pages=1 + 5, page_size=4)
    with pytest.raises(RequestError, match=r"21 tokens.*KV pool holds 20.*--max-total-tokens") as caught:
        h.add("a", [1] * 21)
    assert caught.value.code == "context_length_exceeded"
    h.add("b", [1] * 20, max_new_tokens=100)
    h.run()
    assert len(h.tokens("b")) == 1, "the last token needs no KV"


def test_output_ends_where_the_pool_does(harness) -> None:
    h = harness(num_pages=1 + 5, page_size=4)
    h.add("a", [1] * 10, max_new_tokens=100)
    h.run()
    assert len(h.tokens("a")) == 11 and h.reason("a").type == "length"


def test_an_empty_prompt_and_a_rid_in_use_are_refused(harness) -> None:
    h = harness()
    with pytest.raises(RequestError, match="no tokens"):
        h.add("a", [])
    h.add("a", [1])
    with pytest.raises(RequestError, match="'a' is in use"):
        h.add("a", [1])


def test_a_full_queue_answers_429(harness) -> None:
    h = harness(max_running=1, max_queued=2)
    h.add("a", [1])
    h.plan()
    h.add("b", [1])
    h.add("c", [1])
    with pytest.raises(QueueFullError) as caught:
        h.add("d", [1])
    assert caught.value.status == 429
    assert (h.scheduler.num_running, h.scheduler.num_waiting) == (1, 2)


def test_free_slots_count_before_the_queue_is_full(harness) -> None:
    """A burst on an idle engine is held to slots and queue together, however late the first step comes."""
    h = harness(max_running=2, max_queued=1)
    for rid in "abc":
        h.add(rid, [1])
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        h.add("d", [1])


def test_seeds_are_the_reqs_own_or_drawn_from_the_configs(harness) -> None:
    def seeds(random_seed: int) -> list[int]:
        h = harness(random_seed=random_seed)
        for rid in "abc":
            h.add(rid, [1], seed=42 if rid == "b" else None)
        return [init.seed for init in h.plan().plan.inits]

    assert seeds(0)[1] == seeds(5)[1] == 42
    assert seeds(0) == seeds(0) != seeds(5)
    assert len(set(seeds(0))) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("policy", "best"), ("max_running", 0), ("token_budget", 1), ("context_length", 1), ("output_reserve", 1.5)],
)
def test_a_config_that_could_not_work_is_refused(field: str, value: object) -> None:
    good: dict[str, object] = {"max_running": 1, "context_length": 16}
    with pytest.raises(ConfigError, match=f"{field}="):
        SchedulerConfig(**(good | {field: value}))  # type: ignore[arg-type]


def test_several_tokens_a_step_need_their_result_before_the_next() -> None:
    with pytest.raises(ConfigError, match="max_in_flight=1"):
        SchedulerConfig(max_running=1, context_length=16, tokens_per_step=4, max_in_flight=2)
