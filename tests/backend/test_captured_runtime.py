"""What a runtime with captured steps makes of its driver."""

from __future__ import annotations

import pytest
import torch

from sglang_core.api import CapturedRuntime, CapturedSteps, DeviceDriver, DeviceInfo, DeviceStream, RuntimeContext
from tests.backend.fake_driver import FakeDriver

INFO = DeviceInfo(backend="fake", path="fake", name="the host")
LIMITS = {"max_num_tokens": 4096, "max_num_reqs": 100, "max_num_pages": 8}


class Runtime(CapturedRuntime[DeviceDriver]):
    collectives = "gloo"
    most_captured_reqs = 5

    def batch_sizes(self, largest: int) -> list[int]:
        return [1, largest]


def runtime(driver: FakeDriver, **facts: bool) -> Runtime:
    return Runtime(RuntimeContext(devices=(INFO,), **facts), driver)


def test_buckets_are_decodes_the_longest_first() -> None:
    made = runtime(FakeDriver()).buckets(**LIMITS)
    assert [(b.num_tokens, b.num_reqs, b.max_extend, b.num_pages) for b in made] == [(5, 5, 1, 8), (1, 1, 1, 8)]


@pytest.mark.parametrize("watched", [False, True])
def test_nothing_is_captured_where_ops_are_watched(watched: bool) -> None:
    driver = FakeDriver()
    opened = runtime(driver, watched=watched)
    buckets = opened.buckets(**LIMITS)
    step = opened.compile_step(lambda state, x: x + state, 1, buckets)
    assert step(torch.ones(2)).tolist() == [2, 2]
    assert isinstance(step, CapturedSteps) != watched and len(driver.graphs) == (not watched)


def test_the_drivers_figures_are_the_runtimes() -> None:
    driver = FakeDriver()
    opened = runtime(driver)
    memory = opened.memory()
    assert (memory.free, memory.total, opened.num_allocations()) == (3 << 30, 4 << 30, 0)
    assert driver.num_bound == 1 and opened.torch_device == driver.device
    assert opened.alloc_packed(7).shape == (7,)


def test_its_stream_is_the_devices() -> None:
    stream = runtime(FakeDriver()).stream()
    assert isinstance(stream, DeviceStream) and stream.submit(lambda: 5).result() == 5
    stream.close()
