"""`Perf`: what was measured, as a part of the report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One load. `share` is the least time that the device's own rates allow, over the time it took; `bound` says which rate."""

    op: str
    name: str
    fmt: str
    provider: str
    seconds: float
    nbytes: int
    flops: int
    share: float
    bound: str

    @property
    def label(self) -> str:
        return self.op if self.fmt in ("*", "dense") else f"{self.op} ({self.fmt})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A load without a figure, and why."""

    op: str
    name: str
    fmt: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Perf:
    """`bandwidth` and `matmul` are probes: name -> bytes, or operations, a second. The best of each is the roof."""

    dtype: str
    bandwidth: dict[str, float]
    matmul: dict[str, float]
    rows: tuple[Row, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    seconds: float = 0.0
    emulated: bool = False

    @property
    def roofs(self) -> tuple[float, float]:
        """Bytes a second, operations a second."""
        return max(self.bandwidth.values()), max(self.matmul.values())

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Perf:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError where `data` is no such thing."""
        made = {
            "rows": tuple(Row(**row) for row in data["rows"]),
            "skipped": tuple(Skipped(**row) for row in data["skipped"]),
        }
        return cls(**(data | made))


def share_of(seconds: float, nbytes: int, flops: int, roofs: tuple[float, float]) -> tuple[float, str]:
    """How much of the roofline is reached, and which roof is the lower one here."""
    memory, compute = nbytes / roofs[0], flops / roofs[1]
    return max(memory, compute) / seconds, "memory" if memory >= compute else "compute"
