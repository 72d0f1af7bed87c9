"""A report: everything that a run found, as JSON that can be checked offline.

`digest` is the SHA-256 of the rest. It finds an edited or a cut-off report; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_conformance import mustpass, provenance
from sglang_conformance.case import all_cases
from sglang_conformance.perf.figures import Perf
from sglang_conformance.profiles import LEVELS, QUANT, level_of, outcome, problems_of
from sglang_conformance.result import Result, Verdict
from sglang_conformance.runner import Suite, untested_claims
from sglang_core.backend.claims import Support
from sglang_core.backend.version import API_VERSION
from sglang_core.errors import SglangError

SCHEMA = 1


class ReportError(SglangError):
    """A file that is no report of this suite."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """`data` is the JSON; `results` are its results."""

    data: dict[str, Any]
    results: list[Result]

    @property
    def label(self) -> str:
        return str(self.data["device"]["backend"])

    @property
    def perf(self) -> Perf | None:
        """None: not measured."""
        found = self.data["perf"]
        return None if found is None or "error" in found else Perf.from_json(found)

    @property
    def conformant(self) -> bool:
        return not self.data["problems"] and not self.data["counts"].get(Verdict.FAIL.value)

    @property
    def text(self) -> str:
        """The file."""
        return json.dumps(self.data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def make(
    suite: Suite, results: Sequence[Result], *, partial: bool, seconds: float, perf: dict[str, Any] | None = None
) -> Report:
    """`partial`: cases were selected by name, so that neither profiles nor the list of cases can be judged.

    `perf` is what `perf.apart.measured` gave; it is shown, and decides nothing.
    """
    cases = all_cases()
    problems = expired(suite) + idle_waivers(suite, results)
    if not partial:
        problems += mustpass.problems() + problems_of(suite.claims.profiles, cases, results)
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "api_version": str(API_VERSION),
        "versions": provenance.versions(),
        "packages": provenance.packages(
            [
                "sglang_core",
                "sglang_conformance",
                type(suite.backend).__module__,
                *(k for r in results for k in r.kernels),
            ]
        ),
        "mustpass_sha256": mustpass.sha256(mustpass.current()),
        "tier": mustpass.FULL if suite.full else mustpass.FAST,
        "partial": partial,
        "strict": suite.strict,
        "seed": suite.seed,
        "seconds": round(seconds, 1),
        "device": provenance.device(suite.info),
        "profiles": list(suite.claims.profiles),
        "levels": {} if partial else levels_of(suite.claims.profiles, results),
        "claims": [_claim(claim) for claim in suite.claims.claims],
        "waivers": [
            {"cases": w.cases, "reason": w.reason, "url": w.url, "expires": w.expires} for w in suite.claims.waivers
        ],
        "counts": counts(results),
        "problems": problems,
        "untested_claims": untested_claims(suite.claims),
        "explain": explain_of(results),
        "results": [r.to_json() for r in results],
        "perf": perf,
    }
    return Report(data=data | {"digest": digest(data)}, results=list(results))


def load(path: Path) -> Report:
    """Raises ReportError where the file is no report of this schema."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ReportError(
            f"{path} cannot be read as JSON: {e}; give a file that `sglang-conformance run --json` wrote"
        ) from e
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ReportError(
            f"{path} is no report of schema {SCHEMA}; make one with this version: sglang-conformance run --json"
        )
    try:
        return Report(data=data, results=[Result.from_json(r) for r in data["results"]])
    except (KeyError, TypeError, ValueError) as e:
        raise ReportError(
            f"{path}: a result in it is malformed ({type(e).__name__}: {e}); make the report again"
        ) from e


def intact(path: Path) -> Report:
    """`load`, of a file that nobody changed since it was made: raises ReportError where its digest is another's."""
    report = load(path)
    if digest(report.data) != report.data.get("digest"):
        raise ReportError(f"{path}: its digest is not that of its contents; it was changed after it was made")
    return report


def digest(data: dict[str, Any]) -> str:
    """Of everything but the digest itself."""
    rest = {name: value for name, value in data.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def counts(results: Sequence[Result]) -> dict[str, int]:
    found = Counter(r.verdict for r in results)
    return {v.value: found[v] for v in Verdict}


def expired(suite: Suite) -> list[str]:
    """Waivers past their day fail a run even where nothing needs them any more: they are to be taken out."""
    return [
        f"the waiver of {w.cases!r} expired on {w.expires} ({w.url}): repair it, or ask for another date"
        for w in suite.claims.waivers
        if w.expired(suite.today)
    ]


def idle_waivers(suite: Suite, results: Sequence[Result]) -> list[str]:
    """Under `strict`: waivers whose cases all pass."""
    found = []
    for w in suite.claims.waivers if suite.strict else ():
        mine = [r for r in results if w.covers(r.title)]
        if mine and not any(r.verdict in (Verdict.WAIVED, Verdict.FAIL) for r in mine):
            found.append(f"the waiver of {w.cases!r} waives nothing: its cases pass; take it out")
    return found


def levels_of(profiles: Sequence[str], results: Sequence[Result]) -> dict[str, str]:
    """Every level, and those of quantised formats that are stated: "native", "emulated" or "no"."""
    quantised = [name for name in profiles if name.startswith(QUANT)]
    levels = (level_of(name) for name in (*LEVELS, *quantised))
    return {level.name: outcome(level, all_cases(), results) for level in levels if level is not None}


def _claim(claim: Any) -> dict[str, Any]:
    return {
        "op": claim.op,
        "formats": list(claim.formats),
        "dtypes": list(claim.dtypes),
        "support": Support(claim.support).value,
        "requires": list(claim.requires),
        "unmet": claim.unmet,
    }


def explain_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What `sglang-core explain` would say of each op, format and dtype that ran; several rows where cases differ."""
    rows = {
        (r.op, r.fmt, r.dtype, r.provider, r.why): {
            "op": r.op,
            "fmt": r.fmt,
            "dtype": r.dtype,
            "provider": r.provider,
            "why": r.why,
            "kernels": list(r.kernels),
        }
        for r in results
        if r.why
    }
    return list(rows.values())
