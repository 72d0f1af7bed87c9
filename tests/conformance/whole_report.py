"""A report of every case, made without running any, and copies of it that say something else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang_conformance.profiles import is_held, is_of_device
from sglang_conformance.report import Report, digest, make
from sglang_conformance.result import Result, Verdict

from sglang_core.backend.claims import Claims
from tests.conformance.fake_device import suite


def whole(claims: Claims | None = None, **more: Any) -> Report:
    """A report with a result for every case, as if all had passed on reference bodies; `more` is changed in the first of norm.layer."""
    mine = suite(claims=claims or Claims())
    results = [
        Result(
            op=c.op,
            title=c.title(d),
            dtype=str(d).removeprefix("torch."),
            profile=c.profile,
            fmt=c.fmt,
            verdict=_verdict(c.op),
            provider="fake" if is_of_device(c.op) else "reference",
            why="" if is_of_device(c.op) else "nothing claims it",
        )
        for c, d in mine.select()
    ]
    first = next(i for i, r in enumerate(results) if r.op == "norm.layer")
    results[first] = replace(results[first], **more)
    return make(mine, results, partial=False, seconds=1.0)


def changed(of: Report, *, sealed: bool = True, **more: Any) -> Report:
    """With other data, and a digest that fits it where `sealed`."""
    data = of.data | more
    if sealed:
        data |= {"digest": digest(data)}
    return Report(data=data, results=[Result.from_json(r) for r in data["results"]])


def _verdict(op: str) -> Verdict:
    """Of a backend that claims nothing and states nothing."""
    if not is_of_device(op):
        return Verdict.REFERENCE
    return Verdict.PASS if is_held(op, ()) else Verdict.NOT_CLAIMED
