"""Checks a report offline: is it whole, unaltered, of this suite's cases, and does it say what its results say?"""

from __future__ import annotations

from datetime import date

from sglang_conformance import mustpass
from sglang_conformance.case import all_cases
from sglang_conformance.profiles import problems_of
from sglang_conformance.report import Report, counts, digest
from sglang_conformance.result import Verdict

KEYS = {
    "api_version", "claims", "counts", "device", "digest", "explain", "levels", "made", "mustpass_sha256", "packages", "partial",
    "problems", "profiles", "results", "schema", "seconds", "seed", "strict", "tier", "untested_claims", "versions", "waivers",
}  # fmt: skip


def verify(report: Report, *, today: date) -> list[str]:
    """What is wrong with it, in sentences. Empty: it is whole, and its device conforms."""
    data = report.data
    if missing := KEYS - set(data):
        return [f"it lacks {', '.join(sorted(missing))}"]
    found = []
    if digest(data) != data["digest"]:
        found.append("its digest is not that of its contents: it was changed after it was made")
    recorded = mustpass.recorded()
    if data["mustpass_sha256"] != mustpass.sha256(recorded):
        found.append(
            f"its list of cases ({data['mustpass_sha256'][:12]}) is not this suite's ({mustpass.sha256(recorded)[:12]}):"
            f" verify it with sglang-conformance {data['versions'].get('sglang-conformance', '?')}"
        )
    if data["partial"]:
        found.append("it is of some cases only (-k); run all of them")
    if data["tier"] != mustpass.FULL:
        found.append("it is of the fast cases only; run with --full")
    found += _cases(report, mustpass.titles(recorded, full=data["tier"] == mustpass.FULL))
    if counts(report.results) != data["counts"]:
        found.append("its counts are not those of its results")
    found += [f"{r.title} fails: {r.reason}" for r in report.results if r.verdict is Verdict.FAIL]
    found += [
        f"{r.title} is {r.verdict.value} with an error of {r.ratio:.2f} times what is allowed"
        for r in report.results
        if r.ratio > 1 and r.verdict not in (Verdict.FAIL, Verdict.WAIVED)
    ]
    emulated = bool(data["device"]["facts"].get("emulated"))
    found += [
        f"{r.title} is PASS, and the device is emulated"
        for r in report.results
        if emulated and r.verdict is Verdict.PASS
    ]
    found += [
        f"the waiver of {w['cases']!r} expired on {w['expires']}"
        for w in data["waivers"]
        if today > date.fromisoformat(w["expires"])
    ]
    stated = [] if data["partial"] else problems_of(data["profiles"], all_cases(), report.results)
    return found + stated + [p for p in data["problems"] if p not in stated]


def _cases(report: Report, wanted: set[str]) -> list[str]:
    titles = [r.title for r in report.results]
    found = []
    if twice := {title for title in titles if titles.count(title) > 1} if len(titles) != len(set(titles)) else set():
        found.append(f"{len(twice)} cases have more than one result, such as {min(twice)}")
    for what, some in (("have no result", wanted - set(titles)), ("are not in the list", set(titles) - wanted)):
        if some and not (report.data["partial"] and what == "have no result"):
            found.append(f"{len(some)} cases {what}, such as {min(some)}")
    return found
