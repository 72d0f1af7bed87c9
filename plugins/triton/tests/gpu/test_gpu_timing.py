"""How the runtime times a call: on a stream that comes after the operands, and as a graph where that is allowed."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.gpu.runtime import GpuRuntime

from sglang_core.api import RuntimeContext
from tests.backend.fake_driver import FakeDriver


@pytest.mark.parametrize("replayed", [False, True])
def test_each_run_is_timed(replayed: bool) -> None:
    driver = FakeDriver()
    runtime = GpuRuntime(RuntimeContext(devices=()), driver)
    x, launched = torch.zeros(1), []

    def call() -> torch.Tensor:
        launched.append(1)
        return x.add_(1)

    assert runtime.time_calls(call, repeats=3, replayed=replayed) == [1.0, 2.0, 3.0]
    assert driver.num_replays == (3 if replayed else 0)
    assert len(launched) == (1 if replayed else 3), "a replay launches nothing from the host"
