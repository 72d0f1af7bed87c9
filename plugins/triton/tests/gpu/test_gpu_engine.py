"""The engine on the runtime of GPUs, over a driver that is the host: prefills as they are, decode steps captured and replayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from fake_gpu import FakeGpuBackend, FakeGpuRuntime
from sglang_triton.gpu.runtime import GpuRuntime, batch_sizes

from sglang_core import Engine
from sglang_core.api import RuntimeContext
from tests.backend.fake_driver import FakeDriver

PROMPTS = ["The capital of France is", "One, two, three", "x", "Hello! How are you today?"]
SETTINGS: dict[str, Any] = {
    "model_path": "demo",
    "dtype": "float32",
    "in_process": True,
    "max_running_requests": 3,
    "context_length": 64,
    "chunked_prefill_size": 16,
    "max_total_tokens": 96,
}


def test_tokens_are_those_of_the_reference(fake_gpu: Callable[[], FakeGpuRuntime]) -> None:
    """Batches of one to three, penalties, a prefix from the cache, retraction: a graph for each size and kind of step."""
    asked: list[dict[str, Any]] = [
        {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True},
        {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True, "frequency_penalty": 1.0},
    ]
    made = []
    for device in ("cpu", "fakegpu"):
        with Engine(device=device, **SETTINGS) as engine:
            made.append([[a["output_ids"] for a in engine.generate(PROMPTS, sampling)] for sampling in asked * 2])
    assert made[0] == made[1]
    driver = fake_gpu().driver
    assert driver.num_replays > 20
    assert 6 <= len(driver.graphs) <= 12  # forward and sampling of three sizes, and sampling with penalties


def test_all_buckets_are_captured_before_the_first_request(fake_gpu: Callable[[], FakeGpuRuntime]) -> None:
    with Engine(device="fakegpu", **SETTINGS) as engine:
        captured = len(fake_gpu().driver.graphs)
        assert captured == 2 * len(batch_sizes(3))
        engine.generate(PROMPTS, {"temperature": 0, "max_new_tokens": 4})
        assert len(fake_gpu().driver.graphs) == captured


def test_sizes_are_close_together() -> None:
    for largest in (1, 3, 7, 64, 100, 512):
        sizes = batch_sizes(largest)
        assert sizes[0] == 1 and sizes[-1] == largest and sizes == sorted(set(sizes))
        assert all(b <= a + 1 or b <= a * 1.13 for a, b in itertools.pairwise(sizes))


def test_memory_and_watched_steps(fake_gpu: Callable[[], FakeGpuRuntime]) -> None:
    info = FakeGpuBackend().probe()[0]
    runtime = GpuRuntime(RuntimeContext(devices=(info,)), FakeDriver())
    assert (runtime.memory().free, runtime.memory().total) == (3 * 2**30, 4 * 2**30)
    limits = {"max_num_tokens": 64, "max_num_reqs": 8, "max_num_pages": 4}
    assert [b.num_reqs for b in runtime.buckets(**limits)] == [8, 7, 6, 5, 4, 3, 2, 1]
    watched = GpuRuntime(RuntimeContext(devices=(info,), watched=True), FakeDriver())
    assert watched.buckets(**limits) == ()
    step = watched.compile_step(lambda state, batch: batch + state, 1, ())
    assert step(torch.ones(2)).tolist() == [2, 2]
