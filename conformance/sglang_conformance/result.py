"""`Result`: what became of one case in one dtype, and the verdicts."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from typing import Any

from sglang_conformance.tolerance import Error


class Verdict(enum.Enum):
    PASS = "PASS"  # claimed, a kernel ran on the device, and it is right
    FAIL = "FAIL"  # wrong, an error, a crash, a hang, or a refusal of what is claimed
    REFERENCE = "REFERENCE"  # not claimed: the op's body ran, perhaps over kernels of its parts, and it is right
    NOT_CLAIMED = "NOT_CLAIMED"  # nothing claims it: refused, declared unsupported, or works all the same
    EMULATED = "EMULATED"  # would be PASS, but no such device ran it
    WAIVED = "WAIVED"  # fails, and a waiver that has not expired says so


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """`why` is selection's reason for the provider, `kernels` its functions: what `explain` shows."""

    op: str
    title: str
    dtype: str
    profile: str
    verdict: Verdict
    fmt: str = "*"
    provider: str = ""
    reason: str = ""
    why: str = ""
    kernels: tuple[str, ...] = ()
    works_unclaimed: bool = False  # a kernel ran and is right, and nothing claims it
    seconds: float = 0.0
    errors: dict[str, Error] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The largest share of what any output may err; above 1 it fails."""
        return max((e.ratio for e in self.errors.values()), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"verdict": self.verdict.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError where `data` is no result."""
        errors = {name: Error(**e) for name, e in data["errors"].items()}
        made = {"verdict": Verdict(data["verdict"]), "errors": errors, "kernels": tuple(data["kernels"])}
        return cls(**(data | made))
