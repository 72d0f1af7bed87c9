"""`verify`: what is taken away, edited, or sealed again after it was edited, is found, one field at a time."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import date
from typing import Any

import pytest
from sglang_conformance import provenance
from sglang_conformance.consistency import of_claims
from sglang_conformance.report import Report
from sglang_conformance.result import Verdict
from sglang_conformance.shape import FIELDS
from sglang_conformance.tolerance import Error
from sglang_conformance.verify import verify

from sglang_core.backend.claims import Claim, Claims, Waiver
from sglang_core.backend.interface import DeviceInfo, DeviceNote
from tests.conformance.whole_report import changed, whole

TODAY = date.today()
PERF_ROW = {
    "op": "norm.rms",
    "name": "decode 1",
    "fmt": "*",
    "provider": "fake",
    "seconds": 1.0,
    "nbytes": 50,
    "flops": 0,
}
PERF = {"dtype": "bfloat16", "bandwidth": {"copy": 100.0}, "matmul": {"matmul": 1.0}, "skipped": [], "seconds": 1.0}
PERF |= {"emulated": False, "rows": [PERF_ROW | {"share": 0.5, "bound": "memory"}]}


@pytest.fixture(scope="module")
def report() -> Report:
    return changed(whole(), perf=PERF)


def problems(report: Report) -> str:
    return "\n".join(verify(report, today=TODAY))


def test_it_verifies_as_it_was_made(report: Report) -> None:
    assert problems(report) == ""


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_is_named(report: Report, name: str) -> None:
    data = {key: value for key, value in report.data.items() if key != name}
    assert f"it lacks {name}" in problems(Report(data=data, results=report.results))


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_another_type_is_named(report: Report, name: str) -> None:
    data = report.data | {name: {"a": object()}}
    assert f"its {name} is not what a report has there" in problems(Report(data=data, results=report.results))


def test_a_field_that_nobody_knows_is_named(report: Report) -> None:
    assert "it has certified_by" in problems(changed(report, certified_by="me"))


# Each field, changed to another value that it could have.
EDITS: dict[str, Any] = {
    "schema": 2,
    "made": "2026-01-01T00:00:00+00:00",
    "api_version": "0.9",
    "versions": lambda x: x | {"torch": "9.9"},
    "packages": lambda x: x | {"sglang_core": "0" * 64},
    "mustpass_sha256": "0" * 64,
    "tier": "fast",
    "partial": True,
    "strict": True,
    "seed": 7,
    "seconds": 2.0,
    "device": lambda x: x | {"name": "better"},
    "profiles": ["serving"],
    "levels": lambda x: x | {"serving": "native"},
    "claims": [
        {"op": "norm.rms", "formats": ["*"], "dtypes": ["*"], "support": "native", "requires": [], "unmet": None}
    ],
    "waivers": [{"cases": "x", "reason": "r", "url": "https://example.com", "expires": "2099-01-01"}],
    "counts": lambda x: x | {"PASS": 9999},
    "problems": ["the chip is on fire"],
    "untested_claims": ["norm.rms"],
    "explain": [],
    "results": lambda x: x[1:],
    "perf": None,
    "digest": "0" * 64,
}


def edited(report: Report, name: str, *, sealed: bool) -> Report:
    edit = EDITS[name]
    return changed(report, sealed=sealed, **{name: edit(report.data[name]) if callable(edit) else edit})


@pytest.mark.parametrize("name", FIELDS)
def test_an_edit_is_found_by_the_digest(report: Report, name: str) -> None:
    assert "changed after it was made" in problems(edited(report, name, sealed=False))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("api_version", "is not that of sglang-core"),
        ("packages", "the code of sglang_core that made it is not the code here"),
        ("mustpass_sha256", "list of cases"),
        ("tier", "fast cases only"),
        ("partial", "some cases only"),
        ("profiles", "runs its reference body"),
        ("levels", "its levels are not those of its results"),
        ("claims", "is REFERENCE, and it is claimed"),
        ("counts", "its counts are not those of its results"),
        ("problems", "on fire"),
        ("untested_claims", "untested_claims are not those of its claims"),
        ("explain", "its explain are not those of its results"),
        ("results", "have no result"),
    ],
)
def test_what_follows_from_the_rest_is_worked_out_again(report: Report, name: str, said: str) -> None:
    assert said in problems(edited(report, name, sealed=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"made": "2999-01-01T00:00:00+00:00"}, "and today is"),
        ({"made": "2026-01-01T00:00:00"}, "its made is not"),
        ({"seconds": -1.0}, "its seconds is not"),
        ({"profiles": ["fast"]}, "'fast' is stated, and the suite has none of that name"),
        (
            {"waivers": [{"cases": "x", "reason": "r", "url": "https://a.b", "expires": "2025-12-31"}]},
            "expired on 2025-12-31",
        ),
        ({"waivers": [{"cases": "x", "reason": "r", "url": "no", "expires": "2025-12-31"}]}, "is no URL"),
        ({"perf": PERF | {"rows": [PERF_ROW | {"share": 0.9, "bound": "memory"}]}}, "does not follow from its bytes"),
        ({"perf": PERF | {"rows": [PERF_ROW | {"share": 0.5, "bound": "compute"}]}}, "does not follow from its bytes"),
        ({"perf": PERF | {"rows": [{"op": "x"}]}}, "its perf is not"),
    ],
)
def test_what_cannot_be_is_found(report: Report, wrong: dict[str, Any], said: str) -> None:
    assert said in problems(changed(report, **wrong))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("versions", {}, "gives DeviceInfo no versions"),
        ("facts", {"emulated": True}, "is PASS, and the device is emulated"),
        ("index", -1, "its device is not"),
    ],
)
def test_a_device_says_what_it_stands_on(report: Report, field: str, value: Any, said: str) -> None:
    assert said in problems(changed(report, device=report.data["device"] | {field: value}))


def test_versions_are_of_this_suite_and_kernels_of_packages_with_hashes(report: Report) -> None:
    other = report.data["versions"] | {"sglang-conformance": "0.0.1"}
    assert "made by sglang-conformance 0.0.1" in problems(changed(report, versions=other))
    made = whole(kernels=("nowhere.norm:layer",))
    assert "its packages is not" in problems(made), "a package that is not here has no hash"
    rest = {name: value for name, value in made.data["packages"].items() if name != "nowhere"}
    assert "whose hashes it lacks: nowhere" in problems(changed(made, packages=rest))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"verdict": Verdict.FAIL, "reason": "wrong"}, "fails: wrong"),
        ({"verdict": Verdict.PASS}, "is PASS, and nothing claims it"),
        ({"verdict": Verdict.EMULATED}, "is EMULATED, and the device is not emulated"),
        ({"verdict": Verdict.WAIVED}, "is WAIVED, and no waiver covers it"),
        ({"provider": "acme"}, "is REFERENCE, and acme ran"),
        ({"errors": {"y": Error(1.0, 1.0, 3.0)}}, "3.00 times what is allowed"),
        ({"works_unclaimed": True}, "works unclaimed"),
        ({"profile": "odd_sizes"}, "says profile 'odd_sizes' of itself"),
        ({"fmt": "int4.awq.g128"}, "says fmt 'int4.awq.g128' of itself"),
        ({"dtype": "float64"}, "says dtype 'float64' of itself"),
        ({"op": "norm.rms"}, "says op 'norm.rms' of itself"),
        ({"title": "norm.layer[made up]"}, "not in the list"),
        ({"seconds": 50.0}, "fewer than those of a case"),
    ],
)
def test_a_result_is_held_against_the_rest(wrong: dict[str, Any], said: str) -> None:
    found = problems(whole(**wrong))
    assert said in found, found


def test_a_result_that_stands_twice_is_found(report: Report) -> None:
    results = report.data["results"]
    assert "more than one result" in problems(changed(report, results=results + results[:1]))


def test_claims_are_held_against_verdicts() -> None:
    native = Claims((Claim(op="norm.layer"),))
    made = whole(native)
    assert any("is REFERENCE, and it is claimed" in problem for problem in of_claims(made, TODAY))
    unmet = Claims((Claim(op="norm.layer", requires=("torch>=99",)),))
    assert problems(whole(unmet)) == ""
    missing = whole(native, verdict=Verdict.NOT_CLAIMED)
    assert any("is NOT_CLAIMED, and it is claimed" in problem for problem in of_claims(missing, TODAY))
    waiver = Waiver(cases="norm.layer[*", reason="r", url="https://example.com", expires="2099-01-01")
    assert problems(whole(Claims(waivers=(waiver,)), verdict=Verdict.WAIVED)) == ""


def test_what_a_device_can_do_without_is_in_its_report() -> None:
    note = DeviceNote(name="flashinfer", found="not installed", fix="pip install it")
    info = DeviceInfo(backend="made", path="made/up", name="made up", score=1, versions={"driver": "1"}, notes=(note,))
    made = json.loads(json.dumps(provenance.device(info)))
    assert FIELDS["device"](made) and made["notes"] == [asdict(note)]
    assert not FIELDS["device"](made | {"notes": [{"name": "flashinfer"}]})
