"""Every op has a case on every axis that means something to it, and one that is missing shows."""

from __future__ import annotations

from sglang_conformance.case import all_cases
from sglang_conformance.coverage import AXES, EVERY, Seen, gaps, observed, table

from sglang_core.ops import OPS


def test_an_axis_names_ops_that_there_are_and_says_why_others_have_none() -> None:
    for axis in AXES:
        assert axis.of
        assert axis.of <= EVERY <= set(OPS)
        assert axis.of == EVERY or axis.why_not, axis.name


def test_an_op_without_cases_has_every_gap() -> None:
    seen = {op: Seen() for op in EVERY}
    assert len(gaps(seen)) == sum(len(axis.of) for axis in AXES)
    assert "| norm.rms | NO | NO |" in table(seen)


def test_what_is_seen_is_what_the_cases_call() -> None:
    cases = [case for case in all_cases() if case.op == "norm.layer" and not case.full]
    seen = observed(cases)["norm.layer"]
    assert {0, 1, 9} <= seen.rows
    assert seen.strided
    assert not seen.far
    contiguous = observed([case for case in cases if "sliced" not in case.name])["norm.layer"]
    assert not contiguous.strided


def test_no_axis_is_missing() -> None:
    assert gaps(observed()) == []
