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


class Graph:
    """PyTorch's end with the last reference to them, and what they share with the last of them."""


class Driver(TorchDriver):
    def new_graph(self) -> Graph:
        return Graph()

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
    assert [result for _, result in made] == [0, 1] and first["pool"] is second["pool"]
    assert [first["graph"], second["graph"]] == [graph for graph, _ in made]
    assert {k: first[k] for k in ("stream", "capture_error_mode", "more")} == {
        "stream": "own",
        "capture_error_mode": "thread_local",
        "more": True,
    }


def test_memory_whose_graphs_are_all_gone_is_not_asked_for_again(driver: Driver) -> None:
    """PyTorch has let go of it, and refuses its handle by an assertion. While one of its graphs is left, it is shared."""

    def pools() -> list[Any]:
        return [capture["pool"] for capture in driver.module.captures]

    first, _ = driver.capture(int)
    second, _ = driver.capture(int)
    driver.module.captures[0].pop("graph")
    del first
    third, _ = driver.capture(int)
    assert pools()[0] is pools()[1] is pools()[2]
    for capture in driver.module.captures:
        capture.pop("graph", None)
    del second, third
    driver.capture(int)
    assert pools()[3] is not pools()[0]
