"""A device that is the host: streams whose order is checked, and captures that refuse what a device refuses.

Work runs when it is launched. What is checked is what would have gone wrong on a device: an op touches memory that another stream wrote, and
no event says that it is over; a capture reads a value on the host, or waits; a graph's memory is read after another graph ran.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("aten.item", "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")


class FakeDriverError(RuntimeError):
    """What a device's driver would refuse, or get wrong."""


@dataclass(eq=False)
class FakeStream:
    """Its clock: of each stream, how much of its work comes before what this one is given next."""

    clock: dict[int, int] = field(default_factory=dict)


@dataclass
class FakeEvent:
    driver: FakeDriver
    clock: dict[int, int]

    def synchronize(self) -> None:
        self.driver.refuse_to_wait()
        merge(self.driver.current_stream().clock, self.clock)

    def query(self) -> bool:
        return True


class FakeGraph:
    """Recorded ops with their tensors, run again on those."""

    def __init__(self, driver: FakeDriver, recorder: Recorder) -> None:
        self.driver, self.ops = driver, recorder.ops
        self.made = [t for *_, results in self.ops for t in results if isinstance(t, Tensor) and not recorder.knew(t)]

    def replay(self) -> None:
        for other in self.driver.graphs:
            if other is not self:  # they share their memory
                for t in other.made:
                    t.fill_(torch.nan if t.is_floating_point() else 1)
        for func, args, kwargs, results in self.ops:
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(results, again, strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)
        self.driver.num_replays += 1


class FakeDriver:
    device = torch.device("cpu")

    def __init__(self, *, watch: bool = False) -> None:
        """With `watch`, the order of ops between streams is checked: each thread's ops must run inside `watching`."""
        self.watch = watch
        self.here = threading.local()
        self.default = FakeStream()  # of every thread that has not chosen another
        self.lock = threading.Lock()
        self.writes: dict[int, tuple[int, int]] = {}  # memory -> the stream that wrote it, and its count then
        self.capturing: Recorder | None = None
        self.graphs: list[FakeGraph] = []
        self.num_bound = self.num_replays = 0

    def bind(self) -> None:
        self.num_bound += 1

    def memory(self) -> tuple[int, int]:
        return 3 * 2**30, 4 * 2**30

    def num_allocations(self) -> int:
        return len(self.graphs)

    def synchronize(self) -> None:
        self.refuse_to_wait()

    def refuse_to_wait(self) -> None:
        """In the thread that captures: others may wait meanwhile for what they launched before."""
        if self.capturing is not None and self.capturing.thread == threading.get_ident():
            raise FakeDriverError("the host waits while a stream is captured")

    def new_stream(self) -> FakeStream:
        return FakeStream()

    def current_stream(self) -> FakeStream:
        return getattr(self.here, "stream", self.default)

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.here.stream = self.current_stream(), stream
        try:
            with self.watching():
                yield
        finally:
            self.here.stream = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        if not self.watch:
            yield
            return
        with Order(self):
            yield

    def record(self, stream: FakeStream) -> FakeEvent:
        return FakeEvent(self, dict(stream.clock))

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        merge(stream.clock, event.clock)

    def seconds(self, fn: Callable[[], object], repeats: int) -> list[float]:
        """A second for the first run, two for the next: who takes the wrong ones is seen."""
        for _ in range(repeats):
            fn()
        return [float(i + 1) for i in range(repeats)]

    def capture(self, fn: Callable[[], Any]) -> tuple[FakeGraph, Any]:
        self.capturing = Recorder()
        try:
            with self.capturing as recorder:
                result = fn()
        finally:
            self.capturing = None
        graph = FakeGraph(self, recorder)
        self.graphs.append(graph)
        return graph, result

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def touched(self, memory: int, *, wrote: bool) -> None:
        stream = self.current_stream()
        with self.lock:
            if memory in self.writes:
                writer, count = self.writes[memory]
                if writer != id(stream) and stream.clock.get(writer, 0) < count:
                    raise FakeDriverError("an op touches what another stream writes, and no event says that it is over")
            if wrote:
                stream.clock[id(stream)] = stream.clock.get(id(stream), 0) + 1
                self.writes[memory] = id(stream), stream.clock[id(stream)]


def merge(clock: dict[int, int], known: dict[int, int]) -> None:
    for stream, count in known.items():
        clock[stream] = max(clock.get(stream, 0), count)


class Order(TorchDispatchMode):
    """Tells the driver what memory each op reads and writes. What an op makes counts as written."""

    def __init__(self, driver: FakeDriver) -> None:
        super().__init__()
        self.driver = driver

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
        for argument, value in given:
            wrote = argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(value):
                if isinstance(t, Tensor):
                    self.driver.touched(t.untyped_storage()._cdata, wrote=wrote)
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.driver.touched(t.untyped_storage()._cdata, wrote=True)
        return out


class Recorder(TorchDispatchMode):
    """Every op but views: what they look at stays where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[Any]]] = []
        self.given: list[Tensor] = []
        self.places: set[int] = set()
        self.thread = threading.get_ident()

    def knew(self, t: Tensor) -> bool:
        """Whether it lies in memory from before the capture."""
        return t.untyped_storage()._cdata in self.places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func is torch.ops.aten.index.Tensor and any(t is not None and t.dtype is torch.bool for t in args[1])
        if by_mask or str(func.overloadpacket) in HOST_READS:
            raise FakeDriverError(f"{func} reads a value on the host while a stream is captured")
        made = {t.untyped_storage()._cdata for *_, results in self.ops for t in results if isinstance(t, Tensor)}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in inputs:
            if t.untyped_storage()._cdata not in made:
                self.places.add(t.untyped_storage()._cdata)
                self.given.append(t)  # alive, so that no new tensor takes its place
        out = func(*args, **kwargs)
        results = tree_leaves(out)
        places = {t.untyped_storage()._cdata for t in inputs}
        is_view = any(isinstance(t, Tensor) and t.untyped_storage()._cdata in places for t in results)
        if func._schema.is_mutable or not is_view:
            self.ops.append((func, args, kwargs, results))
        return out
