"""`KernelStream`: a `HostStream` that wakes who waits for a step once the next one is among its kernels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Any

from sglang_core.api import HostStream


class KernelStream(HostStream):
    """Results are kept back until `wake`, which a step calls before its kernels, or until nothing is left to run.

    Who is woken wants Python's lock for a millisecond, to read tokens and to lay out the step after the next. At the end of a step the stream's
    thread needs it as well, to begin the one that lies ready; and until it has it, no kernel runs. Kernels do without.
    """

    def __init__(self, initializer: Callable[[], None]) -> None:
        super().__init__(initializer)
        self._waiting: deque[Future[Any]] = deque()  # of what has not begun, in order
        self._done: deque[tuple[Future[Any], Any, BaseException | None]] = deque()
        self._lock = Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._waiting.append(future)
            super().submit(self._run, fn, args)
        return future

    def wake(self) -> None:
        """Hand out what is done. On the stream's thread."""
        while self._done:
            future, result, error = self._done.popleft()
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def close(self) -> None:
        super().close()
        self.wake()
        for future in self._waiting:
            future.cancel()

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        future = self._waiting.popleft()
        try:
            self._done.append((future, fn(*args), None))
        except BaseException as error:
            self._done.append((future, None, error))
        if not self._waiting:
            self.wake()
