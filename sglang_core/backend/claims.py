"""What a backend says it does natively, and so is held to by conformance and by the fallback policy."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import InvalidRequirement, Requirement

from sglang_core.errors import PluginError


class Support(enum.Enum):
    NATIVE = "native"  # a kernel of its own; refusing it later is a fallback
    REFERENCE = "reference"  # the op's body runs; the default for whatever is not claimed
    UNSUPPORTED = "unsupported"  # not even the body may run (a dtype the device lacks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One claim: an op, for weight formats and dtypes. "*" stands for all, in each of the three.

    `requires` bounds the versions of installed packages, like ("torch>=2.12",): where one is not met, nothing is claimed.
    """

    op: str
    formats: tuple[str, ...] = ("*",)
    dtypes: tuple[str, ...] = ("*",)
    support: Support = Support.NATIVE
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in self.requires:
            try:
                Requirement(text)
            except InvalidRequirement as e:
                raise PluginError(
                    f"claim of {self.op}: requires={text!r} is no requirement ({e}); write it like 'torch>=2.12'"
                ) from e

    @property
    def unmet(self) -> str | None:
        """The first requirement that does not hold here, in words."""
        for requirement in map(Requirement, self.requires):
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                return f"needs {requirement}, which is not installed"
            if not requirement.specifier.contains(found, prereleases=True):
                return f"needs {requirement}, and {found} is installed"
        return None

    def covers(self, op: str, fmt: str, dtype: str) -> bool:
        return (
            self.op in ("*", op)
            and ("*" in self.formats or fmt in self.formats)
            and ("*" in self.dtypes or dtype in self.dtypes)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiver:
    """A known failure that a backend asks users to accept until a date. Conformance reports it, and fails once it expires.

    `cases` is the title of a case, where "*" stands for anything. `url` says where the failure is being worked on.
    """

    cases: str
    reason: str
    url: str
    expires: str  # "2027-01-31"

    def __post_init__(self) -> None:
        if not self.url.startswith(("https://", "http://")):
            raise PluginError(f"waiver of {self.cases!r}: url={self.url!r} is no URL; give the issue's, https://...")
        try:
            date.fromisoformat(self.expires)
        except ValueError as e:
            raise PluginError(
                f"waiver of {self.cases!r}: expires={self.expires!r} is no date; write it like '2027-01-31'"
            ) from e

    def covers(self, title: str) -> bool:
        return re.fullmatch(".*".join(map(re.escape, self.cases.split("*"))), title) is not None

    def expired(self, today: date) -> bool:
        """It holds on the day that it names, and not after."""
        return today > date.fromisoformat(self.expires)


@dataclass(frozen=True, slots=True)
class Claims:
    """Every claim of a backend on a device, first match wins; the conformance profiles it states; known failures."""

    claims: tuple[Claim, ...] = ()
    profiles: tuple[str, ...] = ()
    waivers: tuple[Waiver, ...] = ()

    @classmethod
    def native(cls, ops: Iterable[str], *, dtypes: tuple[str, ...] = ("*",), profiles: tuple[str, ...] = ()) -> Claims:
        return cls(tuple(Claim(op=op, dtypes=dtypes) for op in ops), profiles)

    def support(self, op: str, *, fmt: str = "*", dtype: str = "*") -> Support:
        for claim in self.claims:
            if claim.covers(op, fmt, dtype) and claim.unmet is None:
                return claim.support
        return Support.REFERENCE
