"""What a capture keeps: its results lie where the graph writes, and do not own that memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sglang_triton.gpu.driver import GpuDriver
from torch import Tensor


class Module:
    """A module of PyTorch for a device that captures nothing."""

    def graph_pool_handle(self) -> object:
        return object()

    def current_stream(self, device: torch.device) -> str:
        return "own"

    @contextmanager
    def graph(self, graph: object, **options: Any) -> Iterator[None]:
        yield


class Graph:
    """Of nothing."""


class Driver(GpuDriver):
    def new_graph(self) -> Graph:
        return Graph()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module())
    return Driver(0)


def test_results_lie_where_the_graph_writes(driver: Driver) -> None:
    """Views among them, which keep their place, shape and strides."""
    logits = torch.arange(20.0).view(4, 5)
    _, (whole, part) = driver.capture(lambda: (logits, logits[1:, :3]))
    logits += 100
    assert torch.equal(whole, logits) and torch.equal(part, logits[1:, :3])
    assert part.stride() == (5, 1) and part.storage_offset() == 5


def test_the_memory_of_results_is_free_for_the_next_graph(driver: Driver) -> None:
    made: list[weakref.ref[Tensor]] = []

    def step() -> dict[str, Tensor]:
        x = torch.ones(3)
        made.append(weakref.ref(x))
        return {"ids": x}

    graph, result = driver.capture(step)
    assert isinstance(graph, Graph) and result["ids"].shape == (3,)
    assert made[0]() is None
