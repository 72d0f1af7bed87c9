"""The list of cases: no op without one, and every case is told apart from the others."""

from __future__ import annotations

from collections import Counter

from sglang_conformance.case import all_cases
from sglang_conformance.e2e.case import ENGINE
from sglang_conformance.profiles import is_of_device

from sglang_core.ops import OPS


def test_every_op_has_a_case() -> None:
    tested = {op for case in all_cases() for op in (case.op, *case.covers)}
    assert set(OPS) - tested == set()
    assert {op for op in tested - set(OPS) if not (is_of_device(op) or op.startswith(ENGINE))} == set()


def test_titles_are_unique() -> None:
    titles = Counter(case.title(dtype) for case in all_cases() for dtype in case.dtypes)
    assert [title for title, count in titles.items() if count > 1] == []
