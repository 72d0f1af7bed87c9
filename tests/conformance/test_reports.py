"""Reports: written whole, read back, checked offline, compared, and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sglang_conformance import mustpass, report
from sglang_conformance.cli import main
from sglang_conformance.compare import compare
from sglang_conformance.matrix import markdown, overview
from sglang_conformance.page import html
from sglang_conformance.report import Report, ReportError, digest, make
from sglang_conformance.result import Result, Verdict
from sglang_conformance.tolerance import Error
from sglang_conformance.verify import verify

from sglang_core.backend.claims import Claim, Claims, Waiver
from tests.conformance.fake_device import layer_norm, suite

REPO = Path(__file__).parents[2]
TODAY = date(2026, 1, 1)


def whole(**more: Any) -> Report:
    """A report with a result for every case, as if all had passed on reference bodies; `more` is changed in the first."""
    mine = suite(claims=Claims())
    results = [
        Result(
            op=c.op,
            title=c.title(d),
            dtype=str(d).removeprefix("torch."),
            profile=c.profile,
            fmt=c.fmt,
            verdict=Verdict.REFERENCE,
        )
        for c, d in mine.select()
    ]
    results[0] = replace(results[0], **more)
    return make(mine, results, partial=False, seconds=1.0)


def changed(of: Report, *, sealed: bool = True, **more: Any) -> Report:
    """With other data, and a digest that fits it where `sealed`."""
    data = of.data | more
    if sealed:
        data |= {"digest": digest(data)}
    return Report(data=data, results=[Result.from_json(r) for r in data["results"]])


def test_a_whole_report_verifies_and_survives_its_file(tmp_path: Path) -> None:
    made = whole()
    path = tmp_path / "report.json"
    path.write_text(made.text)
    read = report.load(path)
    assert read.results == made.results
    assert verify(read, today=TODAY) == []
    assert main(["verify", str(path)]) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seed": 7, "sealed": False}, "digest"),
        ({"mustpass_sha256": "0" * 64}, "list of cases"),
        ({"partial": True}, "some cases only"),
        ({"tier": "fast"}, "fast cases only"),
        ({"counts": {}}, "counts"),
        ({"profiles": ["serving"]}, "runs its reference body"),
        ({"problems": ["the chip is on fire"]}, "on fire"),
        ({"waivers": [{"cases": "x", "expires": "2025-12-31"}]}, "expired on 2025-12-31"),
    ],
)
def test_a_report_that_says_what_it_does_not_show_is_refused(wrong: dict[str, Any], said: str) -> None:
    found = verify(changed(whole(), **wrong), today=TODAY)
    assert any(said in problem for problem in found), found


def test_results_are_held_against_the_list_of_cases() -> None:
    made = whole()
    for results, said in (
        (made.data["results"][1:], "1 cases have no result"),
        (made.data["results"] + made.data["results"][:1], "more than one result"),
        (made.data["results"] + [made.data["results"][0] | {"title": "made.up[x]"}], "not in the list"),
    ):
        found = verify(changed(made, results=results), today=TODAY)
        assert any(said in problem for problem in found), found


def test_verdicts_are_held_against_errors_and_device() -> None:
    for more, said in (
        ({"errors": {"y": Error(1.0, 1.0, 3.0)}}, "3.00 times what is allowed"),
        ({"verdict": Verdict.FAIL, "reason": "wrong"}, "fails: wrong"),
    ):
        assert any(said in problem for problem in verify(whole(**more), today=TODAY))
    made = whole(verdict=Verdict.PASS)
    emulated = changed(made, device=made.data["device"] | {"facts": {"emulated": True}})
    assert any("is emulated" in problem for problem in verify(emulated, today=TODAY))


def test_missing_parts_are_named() -> None:
    made = whole()
    data = {name: value for name, value in made.data.items() if name not in ("seed", "explain")}
    assert verify(Report(data=data, results=made.results), today=TODAY) == ["it lacks explain, seed"]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}', '{"schema": 1, "results": [{"op": "x"}]}'])
def test_what_is_no_report_is_an_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportError, match="report.json"):
        report.load(path)
    assert main(["verify", str(path)]) == 2
    assert "report.json" in capsys.readouterr().err


def test_comparison_finds_what_became_worse() -> None:
    before, after = whole(verdict=Verdict.PASS), whole()
    title = before.results[0].title
    assert compare(before, after).regressions == [f"{title}: PASS -> REFERENCE"]
    assert compare(after, before).improvements == [f"{title}: REFERENCE -> PASS"]
    assert compare(before, before) == compare(after, after)
    shorter = Report(data=after.data, results=after.results[1:])
    assert compare(before, shorter).regressions == [f"{title}: PASS -> no result"]
    assert compare(shorter, before).new == [title]
    states = changed(before, profiles=["base"])
    assert "profile base: no longer stated" in compare(states, before).regressions


def test_compare_exits_with_one_on_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, verdict in zip(paths, (Verdict.PASS, Verdict.FAIL), strict=True):
        path.write_text(whole(verdict=verdict).text)
    assert main(["compare", *map(str, paths)]) == 1
    assert "1 regressions" in capsys.readouterr().out
    assert main(["compare", *map(str, reversed(paths))]) == 0


class Outline(HTMLParser):
    """Tags in order, checked for balance; what is loaded from elsewhere."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_the_page_is_one_file_with_a_dot_for_every_error() -> None:
    made = list(suite(layer_norm("wrong")).run(["norm.layer["]))
    mine = make(suite(layer_norm("wrong")), made, partial=True, seconds=1.0)
    page = Outline()
    text = html(changed(mine, problems=["<script>alert(1)</script>"]))
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "script" not in page.seen
    with_errors = [r for r in made if r.errors]
    assert page.seen.count("circle") == len(with_errors) > 0
    assert text.count('class="over"') == sum(r.ratio > 1 for r in with_errors) > 0
    assert "norm.layer[bias-float32]" in text


def test_markdown_counts_what_the_results_are() -> None:
    made = list(suite(layer_norm("honest")).run(["norm.layer["]))
    passed = sum(r.verdict is Verdict.PASS and r.dtype == "float32" for r in made)
    text = markdown(make(suite(layer_norm("honest")), made, partial=True, seconds=1.0))
    assert f"| `norm.layer` | PASS {passed} |" in text


def test_a_run_says_why_it_does_not_conform() -> None:
    waiver = Waiver(cases="norm.*", reason="r", url="https://example.com", expires="2025-01-01")
    mine = suite(
        claims=Claims((Claim(op="norm.layer", requires=("torch>=99",)),), ("serving",), (waiver,)), today=TODAY
    )
    made = make(mine, list(mine.run(["norm.layer["])), partial=True, seconds=1.0)
    assert not made.conformant
    assert made.data["problems"] == [
        "the waiver of 'norm.*' expired on 2025-01-01 (https://example.com): repair it, or ask for another date"
    ]
    assert "torch>=99" in made.data["claims"][0]["unmet"]


# What is checked in.


def test_the_list_of_cases_is_the_one_checked_in() -> None:
    assert mustpass.problems() == [], "cases changed: run sglang-conformance mustpass --write, and say so in the review"


def test_a_list_that_was_edited_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = mustpass.recorded()
    monkeypatch.setattr(mustpass, "recorded", lambda: text.split("\n", 1)[1])
    edited, missing = mustpass.problems()
    assert "hash" in edited
    assert "1 not in it" in missing


def test_committed_reports_verify_and_make_the_page_of_backends() -> None:
    paths = sorted((REPO / "conformance/reports").glob("*.json"))
    assert [path.stem for path in paths] == ["cpu", "xeon"]
    reports = [report.load(path) for path in paths]
    assert (REPO / "docs/backends.md").read_text() == overview(reports), "run: sglang-conformance matrix (see Makefile)"
    for found in reports:
        assert json.loads(found.text) == found.data
        assert digest(found.data) == found.data["digest"]
        assert found.conformant
