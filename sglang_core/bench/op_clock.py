"""`OpClock`: a stopwatch around every bound op of a model, for `profile`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_core.backend.selection import BoundOp


@dataclass(kw_only=True, slots=True)
class OpTime:
    """What one op of one layer class took. Time inside ops that it calls is theirs, not its own."""

    op: str
    layer: str
    provider: str
    calls: int = 0
    seconds: float = 0.0


class OpClock:
    """`instrument` is what an OpTable takes. Ops run one at a time, so a stack of open ones is enough.

    `synchronize` is called on both sides of an op, so that an asynchronous device is measured and not its queue.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.synchronize: Callable[[], None] = lambda: None
        self._clock = clock
        self._times: dict[tuple[str, str, str], OpTime] = {}
        self._inner: list[float] = []  # seconds spent in ops called by each op that is open

    def instrument(self, bound: BoundOp) -> BoundOp:
        key = (bound.site.op, bound.site.layer, bound.provider)
        entry = self._times.setdefault(key, OpTime(op=key[0], layer=key[1], provider=key[2]))
        fn = bound.fn

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.synchronize()
            self._inner.append(0.0)
            started = self._clock()
            try:
                return fn(*args, **kwargs)
            finally:
                self.synchronize()
                seconds = self._clock() - started
                entry.calls += 1
                entry.seconds += seconds - self._inner.pop()
                if self._inner:
                    self._inner[-1] += seconds

        return replace(bound, fn=timed)

    def reset(self) -> None:
        for entry in self._times.values():
            entry.calls, entry.seconds = 0, 0.0

    def ranked(self) -> list[OpTime]:
        """Copies of every op that ran since the last reset, the longest first."""
        return sorted((replace(t) for t in self._times.values() if t.calls), key=lambda t: -t.seconds)
