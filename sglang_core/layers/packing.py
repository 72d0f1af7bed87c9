"""What becomes of a model's quantised weights: run packed by a kernel, run packed by the op's body, or dequantised at load."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal

from sglang_core.backend.selection import REFERENCE, BoundOp

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """The plan for the weights of one layer on this rank, or of all layers alike. Sizes in bytes."""

    op: str
    layer: str  # class
    fmt: str  # as the checkpoint has them
    dtype: str  # of activations, and of weights once dequantised
    plan: Literal["kernel", "reference", "dequantized"]
    packed_bytes: int
    held_bytes: int

    @classmethod
    def of(cls, bound: BoundOp, *, packed: int, held: int) -> Packing:
        """What selection decided at a site, with the bytes of its weights in `site.fmt` and as they are held."""
        plan: Literal["kernel", "reference"] = "reference" if bound.provider == REFERENCE else "kernel"
        return cls(
            op=bound.site.op,
            layer=bound.site.layer,
            fmt=bound.site.fmt,
            dtype=bound.site.dtype,
            plan="dequantized" if bound.dequantized else plan,
            packed_bytes=packed,
            held_bytes=held,
        )

    def plus(self, other: Packing) -> Packing:
        """With the bytes of both."""
        packed, held = self.packed_bytes + other.packed_bytes, self.held_bytes + other.held_bytes
        return replace(self, packed_bytes=packed, held_bytes=held)

    def describe(self) -> str:
        """In words, with what it costs."""
        size, packed = _gib(self.held_bytes), _gib(self.packed_bytes)
        match self.plan:
            case "dequantized":
                return f"{self.fmt} dequantised at load to {self.dtype} (needs {size}; packed it is {packed})"
            case "reference":
                return f"{self.fmt} stays packed ({size}); the op's body dequantises it in every step"
        return f"{self.fmt} runs packed ({size})"


def totals(packings: Iterable[Packing], *by: str) -> list[Packing]:
    """One for each value of the named fields, with the sums of its layers; by default op, layer class and format."""
    key = attrgetter(*(by or ("op", "layer", "fmt")))
    found: dict[object, Packing] = {}
    for one in packings:
        found[key(one)] = one if key(one) not in found else found[key(one)].plus(one)
    return list(found.values())


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
