"""Part `kernels`: each kernel against its floor, which is the longer of its bytes at the copy rate and its operations at the matmul rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.gpu import limits, loads_attention, loads_products, loads_rows
from benchmarks.gpu.load import Load, Work
from benchmarks.gpu.opened import Opened
from benchmarks.gpu.session import ERROR, Case, Facts, Session

LIMITS = "limits"


@dataclass(frozen=True)
class Floor:
    """The least that a load can take, and by what. `rate`: of its operations to the bfloat16 rate, 2 for fp8."""

    seconds: float
    bound: str

    @classmethod
    def of(cls, work: Work, rates: Mapping[str, float]) -> Floor:
        memory, compute = work.nbytes / rates["copy"], work.flops / (work.rate * rates["matmul"])
        return cls(max(memory, compute), "memory" if memory >= compute else "compute")


def all_loads() -> list[Load]:
    """The most telling first: first those of the issue's table, one of each kind, then their other sizes."""
    found = [*loads_attention.LOADS, *loads_products.LOADS, *loads_rows.LOADS]
    return sorted(found, key=lambda load: load.rank)


def cases(opened: Opened, session: Session, only: str = "") -> Iterator[Case]:
    """Limits first, in every run: a ratio is of the run that it was taken in."""
    session.done.pop(LIMITS, None)
    yield Case(LIMITS, partial(limits.measure, opened), first=True)
    for load in all_loads():
        if only in load.name:
            yield Case(load.name, partial(measured, opened, session, load), seconds=load.seconds)


def measured(opened: Opened, session: Session, load: Load) -> Facts:
    """Facts of one load: its floor, its time, how much of the floor it reaches, and what else there is to do the same."""
    rates = session.done[LIMITS]
    work = load.make(opened)
    floor = Floor.of(work, rates)
    seconds = opened.seconds(work.call, replayed=work.replayed)
    facts: dict[str, Any] = {
        "reached": floor.seconds / seconds,
        "target": load.target,
        "bound": floor.bound,
        "us": 1e6 * seconds,
        "floor_us": 1e6 * floor.seconds,
        "provider": work.provider,
        "nbytes": work.nbytes,
        "flops": work.flops,
        "copy": rates["copy"],
        "matmul": rates["matmul"],
    }
    for name, other in {**work.others, **work.compared}.items():
        session.begin(load.name, facts, trying=name)
        try:
            facts[f"{name}_us"] = 1e6 * opened.seconds(other)
            if name in work.compared:
                facts[f"{name}_differs"] = difference(work.compared[name](), work.call())
        except Exception as error:  # a peer that does not take this shape here
            facts[name + ERROR] = f"{type(error).__name__}: {error}"
            if not opened.answers():
                break
    return facts


def difference(x: Tensor, y: Tensor) -> float:
    """The largest difference of two results, in units of the second's root mean square; NaN where one of them has a NaN."""
    wide = x.double(), y.double()
    return float((wide[0] - wide[1]).abs().max() / wide[1].square().mean().sqrt())
