"""How much of a span of time a GPU was busy: the union of what ran on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Interval = tuple[float, float]  # begin, end


def busy_fraction(intervals: Iterable[Interval]) -> float:
    """Of the span from the first begin to the last end. Kernels of several streams may overlap. Raises ValueError where there is none."""
    ordered = sorted(intervals)
    if not ordered:
        raise ValueError("nothing ran on the device while it was watched")
    begin, reached = ordered[0]
    first, busy = begin, 0.0
    for start, end in ordered:
        if start > reached:
            busy += reached - begin
            begin = start
        reached = max(reached, end)
    busy += reached - begin
    return busy / (reached - first)


def device_intervals(run: Callable[[], Any]) -> list[Interval]:
    """Of everything that `run` leads a GPU to do, in microseconds, as torch's profiler saw it."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        run()
    events = watched.events() or []
    return [(e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA]
