"""How long a call takes: warmed up, many to a sample where one is short, the device waited for, the median of samples."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

SAMPLE = 5e-3  # seconds that a sample lasts at least: a clock's tick and a wait for the device are little of it
FEWEST, MOST = 5, 25  # samples


def seconds_a_call(
    calls: Sequence[Callable[[], object]],
    synchronize: Callable[[], None],
    *,
    budget: float,
    of: Callable[[list[float]], float] = statistics.median,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The median (or another `of`) of samples that take `budget` seconds together, if a call is not much longer than that."""
    following = itertools.cycle(calls)

    def sample(count: int) -> float:
        synchronize()
        start = clock()
        for _ in range(count):
            next(following)()
        synchronize()
        return (clock() - start) / count

    sample(1)  # the first call compiles, allocates, or wakes threads
    if (once := sample(1)) > budget:
        return once
    count = max(1, round(SAMPLE / max(once, 1e-7)))
    samples = min(MOST, max(FEWEST, int(budget / (count * max(once, 1e-7)))))
    return of([sample(count) for _ in range(samples)])
