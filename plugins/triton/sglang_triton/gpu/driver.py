"""`Driver`: all that the runtime asks of a GPU, as few calls. Tests put a fake in its place that refuses what a GPU would."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
LEAST_SWEPT = 64 << 20  # bytes: AMD's last cache is behind the L2, and no property tells its size


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None: ...
    def query(self) -> bool: ...


class Graph(Protocol):
    """Captured work of a stream."""

    def replay(self) -> None: ...


class Driver(Protocol):
    """One GPU. Streams are opaque; the current one belongs to a thread."""

    device: torch.device

    def bind(self) -> None:
        """The calling thread works on this GPU from now on."""

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

    def seconds(self, fn: Callable[[], object], repeats: int) -> list[float]:
        """Of each of `repeats` runs of what `fn` launches on the current stream. Before each, memory larger than the L2 cache is written."""
        ...

    def capture(self, fn: Callable[[], T]) -> tuple[Graph, T]:
        """What `fn` launches on the current stream, captured and not run. Graphs share one pool of memory: a replay of one
        overwrites what another has left there."""
        ...


class TorchDriver:
    """`torch.cuda`, which speaks to NVIDIA's driver in one build of PyTorch and to AMD's in another."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self._graph_memory: Any = None
        # Ops sum in float32. By default cuBLAS may add up the parts of a long sum in bfloat16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def bind(self) -> None:
        torch.cuda.set_device(self.device)

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + unused, total

    def num_allocations(self) -> int:
        return int(torch.cuda.memory_stats(self.device).get("allocation.all.allocated", 0))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    def current_stream(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def record(self, stream: Any) -> Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Event) -> None:
        stream.wait_event(event)

    def seconds(self, fn: Callable[[], object], repeats: int) -> list[float]:
        cache = 2 * int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        sweep = torch.empty(max(cache, LEAST_SWEPT), dtype=torch.int8, device=self.device)
        pairs = []
        for _ in range(repeats):
            sweep.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            fn()
            end.record()
            pairs.append((begin, end))
        self.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def capture(self, fn: Callable[[], T]) -> tuple[Graph, T]:
        if self._graph_memory is None:
            self._graph_memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: the engine's other threads may copy and allocate meanwhile.
        with torch.cuda.graph(
            graph, pool=self._graph_memory, stream=self.current_stream(), capture_error_mode="thread_local"
        ):
            result = fn()
        return graph, result
