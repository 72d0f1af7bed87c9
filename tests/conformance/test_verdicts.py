"""Verdicts, and the ways to fail that are no wrong number."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from sglang_conformance import case as case_module
from sglang_conformance.case import Case
from sglang_conformance.profiles import LEVELS, level_of, outcome, problems_of
from sglang_conformance.report import expired, idle_waivers
from sglang_conformance.result import Result, Verdict

from sglang_core.backend.claims import Claim, Claims, Waiver
from sglang_core.backend.kernel import Kernel
from tests.conformance.fake_device import layer_norm, suite

REPO = Path(__file__).parents[2]
WAIVER = Waiver(cases="norm.layer[*", reason="known", url="https://example.com/1", expires="2027-01-31")


def only(results: list[Result]) -> Result:
    (result,) = results
    return result


def one(*args: object, **kwargs: object) -> Result:
    return only(list(suite(*args, **kwargs).run(["norm.layer[bias-float32"])))  # type: ignore[arg-type]


def test_an_emulated_device_never_passes() -> None:
    assert one(layer_norm("honest")).verdict is Verdict.PASS
    assert one(layer_norm("honest"), facts={"emulated": True}).verdict is Verdict.EMULATED


def test_what_the_host_of_an_emulation_has_no_room_for_is_not_run() -> None:
    facts = {"emulated": True, "emulated_copies": 1 << 20}
    far, near = (
        only(list(suite(facts=facts).run([title])))
        for title in ("embed.lookup[rows past 2^31 elements-bfloat16", "embed.lookup[whole-bfloat16")
    )
    assert (far.verdict, near.verdict) == (Verdict.NOT_CLAIMED, Verdict.REFERENCE)
    assert "not run" in far.reason and f"{8 << 20} GiB" in far.reason and not far.works_unclaimed


def test_what_works_and_is_not_claimed_is_reported_and_fails_under_strict() -> None:
    found = one(layer_norm("honest"), claims=Claims())
    assert (found.verdict, found.works_unclaimed) == (Verdict.NOT_CLAIMED, True)
    assert one(layer_norm("honest"), claims=Claims(), strict=True).verdict is Verdict.FAIL
    assert one(claims=Claims(), strict=True).verdict is Verdict.REFERENCE


def test_a_composite_over_a_kernel_of_its_part_is_no_claim_of_its_own() -> None:
    rms = Kernel("norm.rms", provider="fake", fn="tests.conformance.broken:rms", device=("fake",))
    (found,) = suite(rms, strict=True).run(["norm.add_rms[decode-float32"])
    assert (found.verdict, found.provider) == (Verdict.REFERENCE, "decomposed")


@pytest.mark.parametrize(("function", "said"), [("skips", "skips itself"), ("exits", "SystemExit")])
def test_an_excuse_fails(function: str, said: str) -> None:
    found = one(layer_norm(function))
    assert found.verdict is Verdict.FAIL
    assert said in found.reason


def test_a_waiver_holds_until_its_day() -> None:
    claims = Claims((Claim(op="norm.layer"),), waivers=(WAIVER,))
    before = suite(layer_norm("wrong"), claims=claims, today=date(2027, 1, 31))
    found = next(before.run(["norm.layer[bias-float32"]))
    assert found.verdict is Verdict.WAIVED
    assert WAIVER.url in found.reason
    assert expired(before) == []
    after = suite(layer_norm("wrong"), claims=claims, today=date(2027, 2, 1))
    found = next(after.run(["norm.layer[bias-float32"]))
    assert found.verdict is Verdict.FAIL
    assert "expired on 2027-01-31" in found.reason
    assert "2027-01-31" in expired(after)[0]


def test_a_waiver_that_waives_nothing_is_a_problem_under_strict() -> None:
    claims = Claims((Claim(op="norm.layer"),), waivers=(WAIVER,))
    for strict, function, count in ((True, "honest", 1), (False, "honest", 0), (True, "wrong", 0)):
        mine = suite(layer_norm(function), claims=claims, strict=strict, today=date(2026, 1, 1))
        assert len(idle_waivers(mine, list(mine.run(["norm.layer[bias-float32"])))) == count


def test_a_waiver_covers_no_pass_of_others() -> None:
    claims = Claims((Claim(op="norm.layer"),), waivers=(replace(WAIVER, cases="norm.layer[no bias-*"),))
    found = one(layer_norm("wrong"), claims=claims, today=date(2026, 1, 1))
    assert found.verdict is Verdict.FAIL


def test_a_result_survives_json() -> None:
    for result in suite(layer_norm("wrong")).run(["norm.layer[bias"]):
        assert Result.from_json(result.to_json()) == result


# Profiles.


def results_of(name: str, **verdicts: Verdict) -> tuple[list[Case], list[Result]]:
    """A case of every op of a level, PASS but where `verdicts` says otherwise (dots as underscores)."""
    level = level_of(name)
    assert level is not None
    fmt = level.fmt
    cases = [Case(op=op, name="c", run=lambda env: {}, dtypes=(torch.bfloat16,), fmt=fmt) for op in level.ops]
    results = [
        Result(
            op=case.op,
            title=case.title(torch.bfloat16),
            dtype="bfloat16",
            profile="core",
            fmt=fmt,
            verdict=verdicts.get(case.op.replace(".", "_"), Verdict.PASS),
        )
        for case in cases
    ]
    return cases, results


@pytest.mark.parametrize("name", [*LEVELS, "quant:int4.awq.g128"])
def test_a_level_holds_where_its_ops_are_native(name: str) -> None:
    cases, results = results_of(name)
    level = level_of(name)
    assert level is not None
    assert problems_of([name], cases, results) == []
    assert outcome(level, cases, results) == "native"
    assert outcome(level, cases, [replace(r, verdict=Verdict.EMULATED) for r in results]) == "emulated"
    assert len(problems_of([name], cases, results[1:])) == 1, "an op without a result"


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict.REFERENCE, "norm.rms runs its reference body"),
        (Verdict.NOT_CLAIMED, "norm.rms is not claimed"),
        (Verdict.FAIL, "norm.rms fails"),
    ],
)
def test_a_stated_level_on_anything_else_is_a_problem(verdict: Verdict, said: str) -> None:
    cases, results = results_of("serving", norm_rms=verdict)
    (problem,) = problems_of(["serving"], cases, results)
    assert said in problem
    assert problems_of([], cases, results) == []


def test_a_level_of_a_format_is_held_to_that_format() -> None:
    cases, results = results_of("quant:int4.awq.g128")
    assert problems_of(["quant:int8.token_channel"], cases, results) == [
        "profile 'quant:int8.token_channel' is stated, and no case of gemm.linear of int8.token_channel ran"
    ]


def test_a_profile_that_nobody_knows_is_a_problem() -> None:
    (problem,) = problems_of(["servin"], [], [])
    assert "'servin'" in problem
    assert "serving" in problem


def test_levels_name_ops_that_have_cases() -> None:
    ops = {case.op for case in case_module.all_cases()}
    assert {op for level in LEVELS.values() for op in level.ops} - ops == set()


def test_a_suite_without_its_assertions_does_not_run() -> None:
    code = "from tests.conformance.fake_device import suite; suite()"
    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "python -O" in done.stderr
