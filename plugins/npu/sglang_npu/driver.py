"""`Driver`: all that the runtime asks of an NPU, as few calls. An emulation puts the host in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
Lengths = Mapping[str, list[int]]  # of one call of an op, by the names of its arguments


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None: ...
    def query(self) -> bool: ...


class Graph(Protocol):
    """Captured work of a stream."""

    def update(self, lengths: Sequence[Lengths]) -> None:
        """Other host integers for the captured calls of ops that take some, in the order in which they were captured."""

    def replay(self) -> None: ...


class Driver(Protocol):
    """One NPU. Streams are opaque; the current one belongs to a thread."""

    device: torch.device

    def bind(self) -> None:
        """The calling thread works on this NPU from now on."""

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
    def record(self, stream: Any) -> Event: ...
    def wait(self, stream: Any, event: Event) -> None:
        """What `stream` is given from now on runs after `event`. The host goes on."""

    def capture(self, fn: Callable[[], T]) -> tuple[Graph, T]:
        """What `fn` launches on the current stream, captured and not run. Graphs share one pool of memory: a replay of one
        overwrites what another has left there."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """uint8 on the host, from which copies to the NPU need no other."""
        ...


class TorchDriver:
    """`torch.npu`, which torch_npu brings."""

    def __init__(self, index: int) -> None:
        import torch_npu  # noqa: F401  it registers the device

        self._npu: Any = torch.npu
        self.device = torch.device("npu", index)
        self._graph_memory: Any = None
        self._npu.set_compile_mode(jit_compile=False)  # ops from the binary package: none is compiled for a new shape
        self._npu.config.allow_internal_format = True  # weights may be FRACTAL_NZ

    def bind(self) -> None:
        self._npu.set_device(self.device)

    def memory(self) -> tuple[int, int]:
        free, total = self._npu.mem_get_info(self.device)
        unused = self._npu.memory_reserved(self.device) - self._npu.memory_allocated(self.device)
        return free + unused, total

    def num_allocations(self) -> int:
        return int(self._npu.memory_stats(self.device).get("allocation.all.allocated", 0))

    def synchronize(self) -> None:
        self._npu.synchronize(self.device)

    def new_stream(self) -> Any:
        return self._npu.Stream(self.device)

    def current_stream(self) -> Any:
        return self._npu.current_stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._npu.stream(stream)
        return context

    def record(self, stream: Any) -> Event:
        event: Event = self._npu.Event()
        event.record(stream)  # type: ignore[attr-defined]
        return event

    def wait(self, stream: Any, event: Event) -> None:
        stream.wait_event(event)

    def capture(self, fn: Callable[[], T]) -> tuple[Graph, T]:
        if self._graph_memory is None:
            self._graph_memory = self._npu.graph_pool_handle()
        graph = self._npu.NPUGraph()
        # auto_dispatch_capture: calls with host integers can be updated. thread_local: the engine's other threads may copy meanwhile.
        with self._npu.graph(
            graph,
            pool=self._graph_memory,
            stream=self.current_stream(),
            auto_dispatch_capture=True,
            capture_error_mode="thread_local",
        ):
            result = fn()
        return NpuGraph(graph), result

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class NpuGraph:
    """A `torch.npu.NPUGraph`."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def update(self, lengths: Sequence[Lengths]) -> None:
        self._graph.update(cpu_update_input=[dict(each) for each in lengths])

    def replay(self) -> None:
        self._graph.replay()
