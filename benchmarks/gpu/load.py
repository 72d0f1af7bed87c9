"""`Load`: one kernel at one shape, with the bytes and the operations that no kernel of it can do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.gpu.opened import Opened


@dataclass(frozen=True, kw_only=True)
class Work:
    """`nbytes`: each operand and each result once. `flops`: a multiply-add is two. `rate`: of operations to bfloat16's, 2 for fp8.
    `others`: what does the same, by name. `compared`: so do these, in a tensor of the same shape as the call's, which theirs is compared with."""

    call: Callable[[], object]
    nbytes: int
    provider: str
    flops: int = 0
    rate: float = 1.0
    replayed: bool = True
    others: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    compared: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Load:
    """`rank` orders all loads; `target`: of its floor, from the table of what this must reach (0: none was set)."""

    name: str
    make: Callable[[Opened], Work]
    target: float
    rank: int
    seconds: float = 15.0


def size_of(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
