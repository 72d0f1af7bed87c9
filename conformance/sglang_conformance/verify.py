"""Checks a report offline: is it whole, unaltered, of this suite's cases, and does it say what its results say?

A digest finds what was edited; it is no signature, and whoever edits can make another. So whatever follows from the rest is
worked out again, and the hashes of the suite and the core, which together decide what is right, are held against those here.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta

from sglang_conformance import __version__, mustpass, provenance
from sglang_conformance.case import all_cases
from sglang_conformance.consistency import of_claims, of_perf, of_results
from sglang_conformance.profiles import problems_of
from sglang_conformance.report import Report, counts, digest, explain_of, levels_of
from sglang_conformance.result import Verdict
from sglang_conformance.shape import misshapen

JUDGES = ("sglang_core", "sglang_conformance")  # packages that say what is right


def verify(report: Report, *, today: date) -> list[str]:
    """What is wrong with it, in sentences. Empty: it is whole, and its device conforms."""
    data = report.data
    if found := misshapen(data):
        return found
    if digest(data) != data["digest"]:
        found.append("its digest is not that of its contents: it was changed after it was made")
    found += _origin(report, today)
    if data["partial"]:
        found.append("it is of some cases only (-k); run all of them")
    if data["tier"] != mustpass.FULL:
        found.append("it is of the fast cases only; run with --full")
    found += _titles(report, mustpass.titles(mustpass.recorded(), full=data["tier"] == mustpass.FULL))
    found += [f"{r.title} fails: {r.reason}" for r in report.results if r.verdict is Verdict.FAIL]
    found += of_results(report) + of_claims(report, today) + of_perf(report)
    for name, mine in (
        ("counts", counts(report.results)),
        ("levels", {} if data["partial"] else levels_of(data["profiles"], report.results)),
        ("explain", explain_of(report.results)),
    ):
        if data[name] != mine:
            found.append(f"its {name} are not those of its results")
    stated = [] if data["partial"] else problems_of(data["profiles"], all_cases(), report.results)
    return found + stated + [p for p in data["problems"] if p not in stated]


def _origin(report: Report, today: date) -> list[str]:
    """By which code it was made, and when."""
    data, found = report.data, []
    versions, recorded = data["versions"], mustpass.recorded()
    other = f": verify it with sglang-conformance {versions['sglang-conformance']}"
    if data["mustpass_sha256"] != mustpass.sha256(recorded):
        ours = mustpass.sha256(recorded)[:12]
        found.append(f"its list of cases ({data['mustpass_sha256'][:12]}) is not this suite's ({ours}){other}")
    if versions["sglang-conformance"] != __version__:
        found.append(f"it was made by sglang-conformance {versions['sglang-conformance']}, and this is {__version__}")
    if data["api_version"] != ".".join(versions["sglang-core"].split(".")[:2]):
        found.append(f"its api_version {data['api_version']} is not that of sglang-core {versions['sglang-core']}")
    here = provenance.packages(JUDGES)
    for name in JUDGES:
        if data["packages"][name] != here[name]:
            found.append(f"the code of {name} that made it is not the code here{other}, and the same sglang-core")
    ran = {kernel.partition(".")[0] for r in report.results for kernel in r.kernels}
    if unhashed := sorted(ran - set(data["packages"])):
        found.append(f"its kernels are of packages whose hashes it lacks: {', '.join(unhashed)}")
    if datetime.fromisoformat(data["made"]).date() > today + timedelta(days=1):
        found.append(f"it was made on {data['made']}, and today is {today}")
    if data["seconds"] + 0.1 < max((r.seconds for r in report.results), default=0.0):
        found.append("its seconds are fewer than those of a case of it")
    return found


def _titles(report: Report, wanted: set[str]) -> list[str]:
    titles = [r.title for r in report.results]
    found = []
    if twice := {title for title in titles if titles.count(title) > 1} if len(titles) != len(set(titles)) else set():
        found.append(f"{len(twice)} cases have more than one result, such as {min(twice)}")
    for what, some in (("have no result", wanted - set(titles)), ("are not in the list", set(titles) - wanted)):
        if some and not (report.data["partial"] and what == "have no result"):
            found.append(f"{len(some)} cases {what}, such as {min(some)}")
    return found
