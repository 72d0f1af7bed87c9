"""Streams of the `strict` device: what one stream writes and another touches needs an event in between.

The event is a `Work`: `result()` waits for it. What a task knows to be over is what had been waited for where it was submitted, what
ran before it on its stream, and what it waits for itself (vector clocks). Every use of a tensor is kept by its memory; a
second one from elsewhere that the first one is not known to be over before is a race, whether or not it happened this time.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_core.backend.interface import Stream, Work
from sglang_core.backend.strict_trace import StrictError

Clock = dict[int, int]  # stream -> the last of its tasks that is known to be over


@dataclass(slots=True)
class _Uses:
    """Who wrote this memory last, and who has read it since: (stream, task), and the task's title."""

    memory: StorageWeakRef  # what is freed and given out again is other memory
    write: tuple[int, int, str] | None = None
    reads: dict[int, tuple[int, str]] = field(default_factory=dict)


class Races:
    """What every stream of a runtime has touched."""

    def __init__(self) -> None:
        self._here, self._lock = threading.local(), threading.Lock()
        self._uses: dict[int, _Uses] = {}
        self._numbers = itertools.count(1)

    def new_stream(self) -> int:
        return next(self._numbers)

    @property
    def clock(self) -> Clock:
        """What this thread knows to be over. A thread that is no stream's has only what it waited for."""
        if not hasattr(self._here, "clock"):
            self._here.clock = {}
        found: Clock = self._here.clock
        return found

    def waited(self, other: Clock) -> None:
        for stream, task in other.items():
            self.clock[stream] = max(task, self.clock.get(stream, 0))

    def enter(self, stream: int, task: int, title: str, clock: Clock) -> None:
        self.waited(clock)
        self._here.task = (stream, task, title)

    def leave(self) -> None:
        stream, task, _ = self._here.task
        self.clock[stream] = task
        self._here.task = None

    def touch(self, tensors: Iterable[Tensor], *, writes: bool) -> None:
        """Raises StrictError where another stream's use of one of them is not known to be over."""
        me = getattr(self._here, "task", None)
        with self._lock:
            for t in tensors:
                uses = self._uses_of(t)
                others = [uses.write] if uses.write else []
                if writes:
                    others += [(stream, *use) for stream, use in uses.reads.items()]
                for stream, task, title in others:
                    own = me is not None and me[0] == stream
                    if not own and self.clock.get(stream, 0) < task:
                        raise _race(t, me[2] if me else "the host", title, writes)
                if me is None:
                    continue
                if writes:
                    uses.write, uses.reads = me, {}
                else:
                    uses.reads[me[0]] = me[1:]

    def watch(self, pool: Any) -> None:
        """Whoever moves a pool's pages, from whichever thread, uses its leaves."""
        for name, writes in (("export_pages", False), ("import_pages", True), ("move", True), ("poison", True)):
            if hasattr(pool, name):
                setattr(pool, name, functools.partial(self._touching, pool, writes, getattr(pool, name)))

    def _touching(self, pool: Any, writes: bool, method: Callable[..., Any], *args: Any) -> Any:
        self.touch(pool.leaves, writes=writes)
        return method(*args)

    def _uses_of(self, t: Tensor) -> _Uses:
        memory = t.untyped_storage()
        found = self._uses.get(memory._cdata)
        if found is None or found.memory.expired():  # type: ignore[no-untyped-call]
            found = self._uses[memory._cdata] = _Uses(StorageWeakRef(memory))  # type: ignore[no-untyped-call]
        return found


def _race(t: Tensor, mine: str, theirs: str, writes: bool) -> StrictError:
    verb = "writes" if writes else "reads"
    return StrictError(
        f"{mine} {verb} a {t.dtype} tensor {list(t.shape)} that {theirs} uses on another stream, and nothing says that it is over: wait"
        " for its Work (the event) with result(), or submit to the same stream"
    )


class StrictStream:
    """A host stream that is in order with itself, and with nobody else."""

    def __init__(self, races: Races, stream: Stream) -> None:
        self._races, self._stream = races, stream
        self._number, self._tasks = races.new_stream(), itertools.count(1)

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> StrictWork:
        races, stream, task = self._races, self._number, next(self._tasks)
        known, title = dict(races.clock), f"a task of stream {stream} ({getattr(fn, '__qualname__', fn)})"

        def run() -> tuple[Any, Clock]:
            races.enter(stream, task, title, known)
            try:
                with Accesses(races):
                    return fn(*args), dict(races.clock)
            finally:
                races.leave()

        return StrictWork(self._stream.submit(run), races, {stream: task})

    def close(self) -> None:
        self._stream.close()


class StrictWork:
    """Waiting for it tells this thread that the task is over, and all that the task knew."""

    def __init__(self, inner: Work, races: Races, over: Clock) -> None:
        self._inner, self._races, self._over = inner, races, over

    def result(self, timeout: float | None = None) -> Any:
        try:
            out, clock = self._inner.result(timeout)
            self._races.waited(clock)
        finally:
            if self._inner.done():
                self._races.waited(self._over)
        return out

    def done(self) -> bool:
        return self._inner.done()


class Accesses(TorchDispatchMode):
    """Tells `races` of every op in a task. A compiled step, which knows its tensors, tells it itself and switches this off."""

    def __init__(self, races: Races) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._races = races

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
        for argument, value in given:
            tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
            self._races.touch(tensors, writes=argument.alias_info is not None and argument.alias_info.is_write)
        return func(*args, **kwargs)
