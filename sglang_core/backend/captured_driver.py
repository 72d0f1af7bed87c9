"""`DeviceDriver`: all that `CapturedRuntime` asks of a device, as few calls. Tests and emulations put the host in its place."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class DeviceEvent(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None: ...
    def query(self) -> bool: ...


class DeviceGraph(Protocol):
    """Captured work of a stream."""

    def replay(self) -> None: ...


class DeviceDriver(Protocol):
    """One device. Streams are opaque; the current one belongs to a thread."""

    device: torch.device

    def bind(self) -> None:
        """The calling thread works on this device from now on."""

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; what the allocator holds and has not given out is free."""
        ...

    def num_allocations(self) -> int:
        """Tensors that have taken memory so far."""
        ...

    def synchronize(self) -> None: ...
    def new_stream(self) -> Any: ...
    def current_stream(self) -> Any: ...
    def on(self, stream: Any) -> AbstractContextManager[Any]: ...
    def record(self, stream: Any) -> DeviceEvent: ...
    def wait(self, stream: Any, event: DeviceEvent) -> None:
        """What `stream` is given from now on runs after `event`. The host goes on."""

    def capture(self, fn: Callable[[], T]) -> tuple[DeviceGraph, T]:
        """What `fn` launches on the current stream, captured and not run. Graphs share one pool of memory: a replay of one
        overwrites what another has left there."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """uint8 on the host, from which copies to the device need no other."""
        ...


class TorchDriver(ABC):
    """A device by the module that PyTorch, or a package that extends it, has for its kind."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module: Any = torch.get_device_module(device)
        self._graph_memory: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()  # that are in it

    @abstractmethod
    def new_graph(self) -> Any:
        """Where a capture goes."""

    def graph_options(self) -> dict[str, Any]:
        """What the module's `graph` is told beside the graph, its memory and the stream."""
        return {}

    def bind(self) -> None:
        self.module.set_device(self.device)

    def memory(self) -> tuple[int, int]:
        free, total = self.module.mem_get_info(self.device)
        unused = self.module.memory_reserved(self.device) - self.module.memory_allocated(self.device)
        return free + unused, total

    def num_allocations(self) -> int:
        return int(self.module.memory_stats(self.device).get("allocation.all.allocated", 0))

    def synchronize(self) -> None:
        self.module.synchronize(self.device)

    def new_stream(self) -> Any:
        return self.module.Stream(self.device)

    def current_stream(self) -> Any:
        return self.module.current_stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.module.stream(stream)
        return context

    def record(self, stream: Any) -> DeviceEvent:
        event = self.module.Event()
        event.record(stream)
        made: DeviceEvent = event
        return made

    def wait(self, stream: Any, event: DeviceEvent) -> None:
        stream.wait_event(event)

    def capture(self, fn: Callable[[], T]) -> tuple[Any, T]:
        if not self._graphs:  # PyTorch refuses memory whose graphs are all gone
            self._graph_memory = self.module.graph_pool_handle()
        graph = self.new_graph()
        # thread_local: the engine's other threads may copy and allocate meanwhile.
        with self.module.graph(
            graph,
            pool=self._graph_memory,
            stream=self.current_stream(),
            capture_error_mode="thread_local",
            **self.graph_options(),
        ):
            result = fn()
        self._graphs.add(graph)
        return graph, result

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
