"""Two reports of one device: what became worse, and what became better."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_conformance.report import Report, ReportError
from sglang_conformance.result import Result, Verdict

# Best first. To fall from one to a later one is a regression.
ORDER = (Verdict.PASS, Verdict.EMULATED, Verdict.REFERENCE, Verdict.NOT_CLAIMED, Verdict.WAIVED, Verdict.FAIL)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sentences, a case each."""

    regressions: list[str]
    improvements: list[str]
    new: list[str]


def compare(before: Report, after: Report) -> Comparison:
    """`new` are cases that only `after` has; a case that it lacks, and a profile that it no longer states, are regressions.

    Raises ReportError for reports of two devices.
    """
    if before.label != after.label:
        raise ReportError(f"the reports are of {before.label!r} and {after.label!r}; compare two of one device")
    old, new = ({r.title: r for r in report.results} for report in (before, after))
    worse = [f"{title}: {r.verdict.value} -> no result" for title, r in old.items() if title not in new]
    worse += [
        f"profile {name}: no longer stated" for name in before.data["profiles"] if name not in after.data["profiles"]
    ]
    worse += [f"problem: {problem}" for problem in after.data["problems"] if problem not in before.data["problems"]]
    better: list[str] = []
    for title in (title for title in old if title in new):
        a, b = old[title], new[title]
        step = ORDER.index(b.verdict) - ORDER.index(a.verdict)
        if step:
            (worse if step > 0 else better).append(_line(a, b))
    return Comparison(regressions=worse, improvements=better, new=[title for title in new if title not in old])


def _line(a: Result, b: Result) -> str:
    reason = f" ({b.reason})" if b.reason else ""
    return f"{b.title}: {a.verdict.value} -> {b.verdict.value}{reason}"
