"""Step plans: what the driver hands to a runner, and the times it takes down."""

from __future__ import annotations

import pytest

from sglang_core.bench.step import StepDriver, StepShape, fitted
from sglang_core.config import EngineConfig
from sglang_core.errors import ConfigError
from sglang_core.types import FULL, STATE, GroupSpec, StepPlan


class FakeRunner:
    """A step takes as long as it has tokens."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.now = 0.0

    def launch(self, plan: StepPlan) -> FakeRunner:
        self.plans.append(plan)
        self.now += len(plan.token_ids)
        return self

    def result(self) -> None:
        return None


def driver(runner: FakeRunner, num_pages: int = 100) -> StepDriver:
    return StepDriver(runner, page_size=4, num_pages={FULL: num_pages}, vocab_size=50, max_running=8, context_length=64)


def test_a_decode_plan_extends_each_req_by_one() -> None:
    runner = FakeRunner()
    driver(runner).run(StepShape.decode(3, 10))
    [plan] = runner.plans
    assert (plan.mode, plan.slots, plan.prefix_lens, plan.extend_lens) == ("decode", [0, 1, 2], [9] * 3, [1] * 3)
    assert len(plan.token_ids) == 3
    pages = [page for req in plan.new_pages[FULL] for page in req]
    assert sorted(pages) == list(range(1, 10))  # three pages a req, none shared, page 0 left alone


def test_a_windowed_group_has_pages_for_what_is_read_only() -> None:
    groups = (GroupSpec(name="w", kind="windowed", window=6), GroupSpec(name=STATE, kind="state"))
    sizes = {"w": 7, STATE: 3}
    plan = StepDriver(
        FakeRunner(), page_size=4, num_pages=sizes, groups=groups, vocab_size=50, max_running=2, context_length=64
    ).plan(StepShape.decode(2, 20))
    assert plan.new_pages == {"w": [[0, 0, 0, 1, 2], [0, 0, 0, 3, 4]]}
    assert (plan.state_reads, plan.state_writes) == ([0, 0], [1, 2])


def test_a_prefill_plan_starts_at_nothing() -> None:
    runner = FakeRunner()
    driver(runner).run(StepShape.prefill(2, 8))
    [plan] = runner.plans
    assert (plan.mode, plan.prefix_lens, plan.extend_lens, len(plan.token_ids)) == ("prefill", [0, 0], [8, 8], 16)
    assert max(plan.token_ids) < 50


def test_measure_leaves_the_first_step_out() -> None:
    runner = FakeRunner()
    time = driver(runner).measure(StepShape.prefill(2, 5), repeats=3, clock=lambda: runner.now)
    assert len(runner.plans) == 4
    assert [p.step for p in runner.plans] == [0, 1, 2, 3]
    assert (time.median, time.best, time.tokens_per_s) == (10, 10, 1.0)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (StepShape.decode(9, 4), "--max-running-requests 8"),
        (StepShape.decode(1, 65), "context of 64"),
        (StepShape.decode(8, 60), "--max-total-tokens"),
    ],
)
def test_shapes_that_do_not_fit_say_why(shape: StepShape, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        driver(FakeRunner(), num_pages=20).plan(shape)


def test_pool_is_fitted_to_the_shapes_and_the_user_wins() -> None:
    shapes = [StepShape.decode(4, 100), StepShape.prefill(2, 300)]
    config = fitted(EngineConfig.from_flat(model_path="demo", page_size=16), shapes)
    assert config.cache.max_total_tokens is not None
    assert config.cache.max_total_tokens >= 2 * 304
    assert config.schedule.max_running_requests == 4
    assert config.schedule.chunked_prefill_size == 600
    asked = EngineConfig.from_flat(model_path="demo", max_total_tokens=5000, max_running_requests=9)
    kept = fitted(asked, shapes)
    assert (kept.cache.max_total_tokens, kept.schedule.max_running_requests) == (5000, 9)


def test_a_single_decode_step_of_one_req_has_a_chunk_that_the_scheduler_takes() -> None:
    config = fitted(EngineConfig.from_flat(model_path="demo"), [StepShape.decode(1, 100)])
    assert config.schedule.chunked_prefill_size == 2
