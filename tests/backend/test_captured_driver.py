"""`TorchDriver` over a module that notes what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sglang_core.api import TorchDriver


class Module:
    """A device's module of PyTorch, of a device that has given out a fifth of what its allocator holds."""

    def __init__(self) -> None:
        self.captures: list[dict[str, Any]] = []

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 30, 100

    def memory_reserved(self, device: torch.device) -> int:
        return 50

    def memory_allocated(self, device: torch.device) -> int:
        return 10

    def memory_stats(self, device: torch.device) -> dict[str, int]:
        return {"allocation.all.allocated": 7}

    def current_stream(self, device: torch.device) -> str:
        return "own"

    def graph_pool_handle(self) -> object:
        return object()

    @contextmanager
    def graph(self, graph: object, **options: Any) -> Iterator[None]:
        self.captures.append({"graph": graph} | options)
        yield


class Driver(TorchDriver):
    def new_graph(self) -> str:
        return f"graph {len(self.module.captures)}"

    def graph_options(self) -> dict[str, Any]:
        return {"more": True}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module())
    return Driver(torch.device("cpu"))


def test_what_the_allocator_has_not_given_out_is_free(driver: Driver) -> None:
    assert driver.memory() == (70, 100) and driver.num_allocations() == 7


def test_graphs_share_their_memory(driver: Driver) -> None:
    made = [driver.capture(lambda i=i: i) for i in range(2)]
    first, second = driver.module.captures
    assert made == [("graph 0", 0), ("graph 1", 1)] and first["pool"] is second["pool"]
    assert {k: first[k] for k in ("stream", "capture_error_mode", "more")} == {
        "stream": "own",
        "capture_error_mode": "thread_local",
        "more": True,
    }
