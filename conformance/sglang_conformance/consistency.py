"""What a report's results, claims and figures must say of each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date
from typing import Any

from sglang_conformance.case import Case, all_cases, dtype_name
from sglang_conformance.e2e.case import ENGINE
from sglang_conformance.perf.figures import share_of
from sglang_conformance.profiles import is_held, is_of_device
from sglang_conformance.report import Report
from sglang_conformance.result import Result, Verdict
from sglang_conformance.runner import untested_claims
from sglang_core.backend.claims import Claim, Claims, Support, Waiver
from sglang_core.backend.selection import DECOMPOSED, REFERENCE
from sglang_core.errors import PluginError

RAN = (Verdict.PASS, Verdict.EMULATED)  # claimed, and a kernel or the device itself did it


def of_results(report: Report) -> list[str]:
    """Each result against its case, its errors and the device."""
    cases = {case.title(dtype): (case, dtype_name(dtype)) for case in all_cases() for dtype in case.dtypes}
    emulated = bool(report.data["device"]["facts"].get("emulated"))
    found = []
    for r in report.results:
        says = f"{r.title} is {r.verdict.value}"
        if r.title in cases and (wrong := _of_case(r, *cases[r.title])):
            found.append(f"{r.title} says {wrong} of itself that its case does not")
        if r.ratio > 1 and r.verdict not in (Verdict.FAIL, Verdict.WAIVED):
            found.append(f"{says} with an error of {r.ratio:.2f} times what is allowed")
        if r.verdict is Verdict.PASS and emulated:
            found.append(f"{says}, and the device is emulated")
        if r.verdict is Verdict.EMULATED and not emulated:
            found.append(f"{says}, and the device is not emulated")
        if r.works_unclaimed and (r.verdict is not Verdict.NOT_CLAIMED or report.data["strict"]):
            found.append(f"{says}, works unclaimed, and strict is {report.data['strict']}")
    return found


def _of_case(r: Result, case: Case, dtype: str) -> str:
    mine = {"op": r.op, "dtype": r.dtype, "profile": r.profile, "fmt": r.fmt}
    theirs = {"op": case.op, "dtype": dtype, "profile": case.profile, "fmt": case.fmt}
    return ", ".join(f"{name} {value!r}" for name, value in mine.items() if theirs[name] != value)


def of_claims(report: Report, today: date) -> list[str]:
    """Verdicts against what is claimed and waived."""
    data = report.data
    try:
        waivers = tuple(Waiver(**w) for w in data["waivers"])
        claims = Claims(tuple(map(_claim, data["claims"])), tuple(data["profiles"]), waivers)
    except (PluginError, ValueError) as e:
        return [f"its claims cannot be read: {e}"]
    found = [f"the waiver of {w.cases!r} expired on {w.expires}" for w in waivers if w.expired(today)]
    if data["untested_claims"] != untested_claims(claims):
        found.append("its untested_claims are not those of its claims")
    unmet = [bool(claim["unmet"]) for claim in data["claims"]]
    met = Claims(tuple(c for c, missing in zip(claims.claims, unmet, strict=True) if not missing))
    for r in report.results:
        found += [f"{r.title} is {r.verdict.value}, and {problem}" for problem in _against_claims(r, met, claims)]
    return found


def _claim(data: dict[str, Any]) -> Claim:
    """Its `requires` were settled where the report was made."""
    fields = {name: tuple(data[name]) for name in ("formats", "dtypes")}
    return Claim(op=data["op"], support=Support(data["support"]), **fields)


def _against_claims(r: Result, met: Claims, claims: Claims) -> Iterator[str]:
    support = met.support(r.op, fmt=r.fmt, dtype=r.dtype)
    if is_of_device(r.op):
        claimed = is_held(r.op, claims.profiles) and support is not Support.UNSUPPORTED
    elif r.op.startswith(ENGINE):  # kernels of many ops ran, or none did
        claimed = r.provider != REFERENCE and r.verdict is not Verdict.NOT_CLAIMED
    else:
        claimed = support is Support.NATIVE
    if r.verdict in RAN and not claimed:
        yield "nothing claims it"
    if r.verdict in RAN and r.provider == REFERENCE:
        yield "its reference body ran"
    if r.verdict is Verdict.REFERENCE and (claimed or r.provider not in (REFERENCE, DECOMPOSED)):
        yield "it is claimed" if claimed else f"{r.provider or 'nothing'} ran"
    if r.verdict is Verdict.NOT_CLAIMED and claimed and r.profile in ("core", *claims.profiles):
        yield "it is claimed"
    if r.verdict is Verdict.WAIVED and not any(w.covers(r.title) for w in claims.waivers):
        yield "no waiver covers it"


def of_perf(report: Report) -> list[str]:
    """Shares against the times and rates that they are made of."""
    perf = report.perf
    if perf is None:
        return []
    found = []
    for row in perf.rows:
        share, bound = share_of(row.seconds, row.nbytes, row.flops, perf.roofs)
        if not math.isclose(share, row.share, rel_tol=1e-6) or bound != row.bound:
            found.append(f"its perf of {row.op} [{row.name}] does not follow from its bytes, operations and seconds")
    return found
