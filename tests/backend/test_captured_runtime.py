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


class PrefillRuntime(Runtime):
    captures_prefills = True
    most_captured_reqs = 100

    def batch_sizes(self, largest: int) -> list[int]:
        return [1, 16, 48, largest]

    def token_sizes(self, largest: int) -> list[int]:
        return [largest // 2, largest]


def shapes(opened: Runtime, **limits: int) -> list[tuple[int, int, int]]:
    return [(b.num_tokens, b.num_reqs, b.max_extend) for b in opened.buckets(**(LIMITS | limits))]


def test_steps_with_prefills_have_buckets_for_few_reqs_and_for_many() -> None:
    """Reqs are as many as a decode step has, so that sampling needs no graphs of its own."""
    opened = PrefillRuntime(RuntimeContext(devices=(INFO,), prefill_graph_tokens=64), FakeDriver())
    prefills = [(64, 100, 64), (64, 16, 64), (32, 48, 32), (32, 16, 32)]
    assert sorted(shapes(opened), reverse=True) == shapes(opened)
    assert [shape for shape in shapes(opened) if shape[2] > 1] == prefills
    assert [shape[1] for shape in shapes(opened) if shape[2] == 1] == [100, 48, 16, 1]
    assert max(shapes(opened, max_num_tokens=40)) == (100, 100, 1)
    assert {s[0] for s in shapes(opened, max_num_tokens=40) if s[2] > 1} == {20, 40}


@pytest.mark.parametrize("made", [Runtime, PrefillRuntime])
def test_no_prefill_has_a_bucket_unless_asked_for_and_the_device_can(made: type[Runtime]) -> None:
    asked = made(RuntimeContext(devices=(INFO,), prefill_graph_tokens=64 * (made is Runtime)), FakeDriver())
    assert {shape[2] for shape in shapes(asked)} == {1}
