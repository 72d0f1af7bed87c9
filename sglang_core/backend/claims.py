"""What a backend says it does natively, and so is held to by conformance and by the fallback policy."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Support(enum.Enum):
    NATIVE = "native"  # a kernel of its own; refusing it later is a fallback
    REFERENCE = "reference"  # the op's body runs; the default for whatever is not claimed
    UNSUPPORTED = "unsupported"  # not even the body may run (a dtype the device lacks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One claim: an op, for weight formats and dtypes. "*" stands for all, in each of the three."""

    op: str
    formats: tuple[str, ...] = ("*",)
    dtypes: tuple[str, ...] = ("*",)
    support: Support = Support.NATIVE

    def covers(self, op: str, fmt: str, dtype: str) -> bool:
        return (
            self.op in ("*", op)
            and ("*" in self.formats or fmt in self.formats)
            and ("*" in self.dtypes or dtype in self.dtypes)
        )


@dataclass(frozen=True, slots=True)
class Claims:
    """Every claim of a backend on a device, first match wins, and the conformance profiles it states."""

    claims: tuple[Claim, ...] = ()
    profiles: tuple[str, ...] = ()

    @classmethod
    def native(cls, ops: Iterable[str], *, dtypes: tuple[str, ...] = ("*",), profiles: tuple[str, ...] = ()) -> Claims:
        return cls(tuple(Claim(op=op, dtypes=dtypes) for op in ops), profiles)

    def support(self, op: str, *, fmt: str = "*", dtype: str = "*") -> Support:
        for claim in self.claims:
            if claim.covers(op, fmt, dtype):
                return claim.support
        return Support.REFERENCE
