"""Every load on a device, in one process and a bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import pytest
import torch

from sglang_conformance.case import dtype_name
from sglang_conformance.perf.clock import seconds_a_call
from sglang_conformance.perf.figures import Perf, Row, Skipped, share_of
from sglang_conformance.perf.load import Load, PerfEnv, Stock, all_loads
from sglang_conformance.perf.roofline import bandwidth, matmul_rate
from sglang_conformance.runner import Suite
from sglang_core.backend.claims import Support
from sglang_core.errors import KernelSelectionError, SglangError

LIMIT = 75.0  # seconds: what has not begun by then is not measured, and said to be so
ROW_SECONDS = 0.25  # of samples a load
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the first that the device supports
OUT_OF_TIME = "the time was up"


def measure(
    suite: Suite,
    select: Iterable[str] = (),
    *,
    limit: float = LIMIT,
    seen: Callable[[Row | Skipped], None] | None = None,
) -> Perf:
    """Loads whose title contains one of `select`, or all. `seen` is called with each figure as it is made.

    Weight formats that are not claimed natively are left out: they run as dense ones do, after they were dequantised.

    Raises SglangError where nothing is selected.
    """
    dtype = next(d for d in DTYPES if suite.claims.support("gemm.linear", dtype=dtype_name(d)) != Support.UNSUPPORTED)
    start = time.perf_counter()
    stock: Stock = {}

    def make_env() -> PerfEnv:
        env = suite.env(dtype, suite.seed, PerfEnv)
        env.stock = stock
        return env

    wanted = list(select)
    loads = [
        load
        for load in all_loads()
        if (not wanted or any(text in load.title for text in wanted)) and _runs(suite, load, dtype)
    ]
    if not loads:
        raise SglangError(f"no load's title contains {' or '.join(map(repr, wanted))}; run perf without -k to see all")
    with torch.inference_mode():
        probes = bandwidth(make_env(), suite.synchronize), matmul_rate(make_env(), suite.synchronize)
        roofs = max(probes[0].values()), max(probes[1].values())
        found: list[Row | Skipped] = []
        for load in loads:
            late = time.perf_counter() > start + limit
            found.append(_skipped(load, OUT_OF_TIME) if late else _measured(suite, load, make_env(), roofs))
            if seen is not None:
                seen(found[-1])
    return Perf(
        dtype=dtype_name(dtype),
        bandwidth=probes[0],
        matmul=probes[1],
        rows=tuple(x for x in found if isinstance(x, Row)),
        skipped=tuple(x for x in found if isinstance(x, Skipped)),
        seconds=round(time.perf_counter() - start, 1),
        emulated=bool(suite.info.facts.get("emulated")),
    )


def _runs(suite: Suite, load: Load, dtype: torch.dtype) -> bool:
    support = suite.claims.support(load.op, fmt=load.fmt, dtype=dtype_name(dtype))
    return support is Support.NATIVE or (support is Support.REFERENCE and load.fmt in ("*", "dense"))


def _measured(suite: Suite, load: Load, env: PerfEnv, roofs: tuple[float, float]) -> Row | Skipped:
    try:
        work = load.make(env)
        seconds = seconds_a_call(work.calls, suite.synchronize, budget=ROW_SECONDS)
    except KernelSelectionError as e:
        return _skipped(load, str(e))
    except (
        Exception,
        SystemExit,
        pytest.skip.Exception,
    ) as e:  # a kernel may raise anything, and this is no place for verdicts
        return _skipped(load, f"{type(e).__name__}: {e}")
    share, bound = share_of(seconds, work.nbytes, work.flops, roofs)
    return Row(
        op=load.op,
        name=load.name,
        fmt=load.fmt,
        provider=env.bound[load.op].provider,
        seconds=seconds,
        nbytes=work.nbytes,
        flops=work.flops,
        share=share,
        bound=bound,
    )


def _skipped(load: Load, reason: str) -> Skipped:
    return Skipped(op=load.op, name=load.name, fmt=load.fmt, reason=reason)
