"""One test a case and dtype. What is not claimed and not run is a skip, that is counted by its verdict; any other skip fails."""

from __future__ import annotations

import pytest
import torch

from sglang_conformance.case import Case
from sglang_conformance.plugin import DECLARED, VERDICT
from sglang_conformance.runner import Suite, Verdict, untested_claims


def test_conformance(request: pytest.FixtureRequest, conformance_suite: Suite, case: Case, dtype: torch.dtype) -> None:
    result = conformance_suite.judge(case, dtype)
    request.node.user_properties.append((VERDICT, result.verdict.value))
    if result.verdict is Verdict.WAIVED or (result.verdict is Verdict.NOT_CLAIMED and not result.works_unclaimed):
        request.node.stash[DECLARED] = True
        pytest.skip(f"{result.verdict.value}: {result.reason}")
    assert result.verdict is not Verdict.FAIL, result.reason


def test_every_claim_is_tested(conformance_suite: Suite) -> None:
    assert untested_claims(conformance_suite.claims) == []
