"""Captured steps: replayed on new inputs, each result whole, and refused where a device would refuse the capture."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_core.api import CapturedSteps
from sglang_core.backend.captured_step import VARIANTS_PER_BUCKET
from tests.backend.fake_driver import FakeDriver, FakeDriverError


@dataclass
class Batch:
    x: Tensor
    scale: int = 1


def step(state: list[Tensor], batch: Batch) -> Tensor:
    batch.x = batch.x + 1  # steps may rebind their batch's fields
    state[0].add_(batch.x.sum())
    return batch.x * batch.scale


def test_a_replay_is_the_step() -> None:
    driver, state = FakeDriver(), [torch.zeros(())]
    captured = CapturedSteps(step, state, driver.capture, 1)
    captured(Batch(torch.zeros(3)))
    state[0].zero_()
    first, second = captured(Batch(torch.tensor([1.0, 2, 3]))), captured(Batch(torch.tensor([4.0, 5, 6])))
    assert first.tolist() == [2, 3, 4] and second.tolist() == [5, 6, 7]
    assert state[0] == 9 + 18
    assert len(driver.graphs) == 1 and driver.num_replays == 3


def test_graphs_share_memory_and_results_do_not() -> None:
    driver = FakeDriver()
    captured = CapturedSteps(step, [torch.zeros(())], driver.capture, 2)
    short, long = (captured(Batch(torch.zeros(n), scale=2)) for n in (2, 5))
    assert short.tolist() == [2, 2] and long.tolist() == [2] * 5
    assert captured(Batch(torch.ones(2), scale=2)).tolist() == [4, 4] and long.tolist() == [2] * 5
    assert len(driver.graphs) == 2


def test_static_values_have_graphs_of_their_own() -> None:
    captured = CapturedSteps(step, [torch.zeros(())], (driver := FakeDriver()).capture, 1)
    made = [captured(Batch(torch.ones(2), scale=scale))[0].item() for scale in (1, 3, 1, 3)]
    assert made == [2, 6, 2, 6] and len(driver.graphs) == 2


def test_kinds_beyond_the_limit_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    captured = CapturedSteps(step, [torch.zeros(())], (driver := FakeDriver()).capture, 1)
    for scale in range(VARIANTS_PER_BUCKET + 2):
        assert captured(Batch(torch.ones(2), scale=scale))[0] == 2 * scale
    assert len(driver.graphs) == VARIANTS_PER_BUCKET
    assert [record.message.split(":")[0] for record in caplog.records] == ["a step runs without a graph"]


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: 1 if torch.equal(x, x) else 0]
)
def test_a_capture_refuses_reads_on_the_host(read: Any) -> None:
    driver = FakeDriver()
    captured = CapturedSteps(lambda state, batch: batch.x * read(batch.x), None, driver.capture, 1)
    with pytest.raises(FakeDriverError, match="on the host"):
        captured(Batch(torch.ones(2)))
    assert driver.capturing is None


def test_a_capture_refuses_to_wait() -> None:
    driver = FakeDriver()

    def waits(state: None, batch: Batch) -> Tensor:
        if driver.capturing:
            driver.record(driver.current_stream()).synchronize()
        return batch.x

    with pytest.raises(FakeDriverError, match="waits"):
        CapturedSteps(waits, None, driver.capture, 1)(Batch(torch.ones(2)))


def test_another_thread_may_wait_meanwhile() -> None:
    """The engine's reads a result while a late kind of step is captured."""
    driver = FakeDriver()

    def step(state: None, batch: Batch) -> Tensor:
        if driver.capturing:
            with ThreadPoolExecutor(1) as other:
                other.submit(driver.synchronize).result()
        return batch.x + 1

    assert CapturedSteps(step, None, driver.capture, 1)(Batch(torch.zeros(2))).tolist() == [1, 1]
