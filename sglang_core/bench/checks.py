"""What `tune` holds of a call: whether its result is right, and how long it takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from sglang_core.backend.interface import DeviceRuntime
from sglang_core.backend.kernel import Kernel
from sglang_core.bench.op_calls import Call, OpCall
from sglang_core.errors import DeviceError
from sglang_core.runner.verify import LIMITS, distance, tensors_of

MARGIN = 0.02  # what is less than so much faster is no better: that is what two measurements of one kernel differ by
WRONG = "wrong result"


def seconds(call: Call, runtime: DeviceRuntime, repeats: int, *, replayed: bool) -> float:
    return statistics.median(runtime.time_calls(call, repeats=repeats, replayed=replayed))


def graph_safe(kernels: Iterable[Kernel]) -> bool:
    return all("graph_safe" in kernel.features for kernel in kernels)


def mean_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The geometric mean of first over second."""
    return math.exp(statistics.fmean(math.log(own / base) for own, base in pairs))


def check(call: OpCall, expected: Sequence[object]) -> str:
    """ "" or WRONG. The last set of activations first, so that memory still holds results of another set than the one asked for."""
    for kernel, want in reversed(list(zip(call.kernel, expected, strict=True))):
        for got, reference in zip(tensors_of(kernel()), tensors_of(want), strict=True):
            error, _ = distance(got, reference)
            if not error <= LIMITS[got.dtype]:
                return WRONG
    return ""


def check_in_force(call: OpCall, expected: Sequence[object], *, what: str, way_out: str) -> None:
    """Raises DeviceError where what all else is compared with does not run, or is wrong itself."""
    title = f"the {what} in force for {call.bound.site.op} ({call.title})"
    try:
        reason = check(call, expected)
    except Exception as error:  # the device's own
        raise DeviceError(f"{title} does not run: {type(error).__name__}: {first_line(error)}; {way_out}") from error
    if reason:
        raise DeviceError(f"{title} is wrong itself; run the conformance suite on this device first")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
