"""Reports: written whole, read back, checked offline, compared, and shown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sglang_conformance import mustpass, report
from sglang_conformance.cli import main
from sglang_conformance.compare import compare
from sglang_conformance.matrix import markdown, overview
from sglang_conformance.page import html
from sglang_conformance.perf.figures import Perf, Row, Skipped
from sglang_conformance.report import Report, ReportError, digest, make
from sglang_conformance.result import Verdict
from sglang_conformance.verify import verify

from sglang_core.backend.claims import Claim, Claims, Waiver
from tests.conformance.fake_device import layer_norm, suite
from tests.conformance.whole_report import changed, whole

REPO = Path(__file__).parents[2]
TODAY = date.today()


def test_a_whole_report_verifies_and_survives_its_file(tmp_path: Path) -> None:
    made = whole()
    path = tmp_path / "report.json"
    path.write_text(made.text)
    read = report.load(path)
    assert read.results == made.results
    assert verify(read, today=TODAY) == []
    assert main(["verify", str(path)]) == 0


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
    first = next(i for i, r in enumerate(before.results) if r.verdict is not after.results[i].verdict)
    title = before.results[first].title
    assert compare(before, after).regressions == [f"{title}: PASS -> REFERENCE"]
    assert compare(after, before).improvements == [f"{title}: REFERENCE -> PASS"]
    assert compare(before, before) == compare(after, after)
    shorter = Report(data=after.data, results=after.results[:first] + after.results[first + 1 :])
    assert compare(before, shorter).regressions == [f"{title}: PASS -> no result"]
    assert compare(shorter, before).new == [title]
    states = changed(before, profiles=["base"])
    assert "profile base: no longer stated" in compare(states, before).regressions


def test_a_problem_that_is_new_is_a_regression() -> None:
    before = whole()
    after = changed(before, problems=["the waiver of 'x' expired"])
    assert compare(before, after).regressions == ["problem: the waiver of 'x' expired"]
    assert compare(after, before).regressions == []


def test_reports_of_two_devices_are_not_compared() -> None:
    mine = whole()
    other = changed(mine, device=mine.data["device"] | {"backend": "acme"})
    with pytest.raises(ReportError, match="'fake' and 'acme'"):
        compare(mine, other)


def test_what_was_edited_is_neither_compared_nor_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edited.json"
    path.write_text(changed(whole(), sealed=False, seed=7).text)
    assert main(["compare", str(path), str(path)]) == 2
    assert "changed after it was made" in capsys.readouterr().err
    assert main(["matrix", str(path)]) == 2


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
    assert "does not conform" in text
    with_errors = [r for r in made if r.errors]
    assert text.count('of what is allowed"></i>') == len(with_errors) > 0
    assert text.count(' over" style=') == sum(r.ratio > 1 for r in with_errors) > 0
    assert "norm.layer[bias-float32]" in text


def perf() -> Perf:
    fast = Row(
        op="gemm.linear",
        name="decode 1",
        fmt="dense",
        provider="acme",
        seconds=1e-3,
        nbytes=10**7,
        flops=10**7,
        share=0.5,
        bound="memory",
    )
    slow = replace(fast, op="norm.rms", flops=0, provider="reference", share=0.01)
    late = Skipped(op="norm.layer", name="decode 1", fmt="*", reason="the time was up")
    return Perf(dtype="bfloat16", bandwidth={"copy": 2e10}, matmul={"matmul": 3e12}, rows=(fast, slow), skipped=(late,))


def test_the_page_and_the_markdown_show_figures_and_their_lack() -> None:
    made = whole()
    assert "Speed" not in html(made)
    shown = changed(made, perf=perf().to_json())
    page = Outline()
    page.feed(text := html(shown))
    assert page.open == []
    assert page.seen.count("circle") == 1, "what computes nothing has no intensity"
    assert 'style="width:50.0%"' in text
    assert "1 not measured: the time was up" in text
    assert "| `norm.rms` | decode 1 | REFERENCE | 1.00 ms | 1% of memory |" in markdown(shown)
    assert "did not end" in html(changed(made, perf={"error": "did not end within 9 s"}))
    assert "did not end" in markdown(changed(made, perf={"error": "did not end within 9 s"}))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_scrolling_sideways(width: int, tmp_path: Path) -> None:
    """A frame as wide as a desktop's window or a phone's: the page inside says how wide it has become."""
    page, frame = tmp_path / "page.html", tmp_path / "frame.html"
    page.write_text(html(changed(whole(), perf=perf().to_json())))
    script = "document.title = f.contentDocument.documentElement.scrollWidth + ' of ' + f.contentDocument.documentElement.clientWidth"
    frame.write_text(
        f'<iframe id="f" src="page.html" width="{width}" height="900" style="border:0" onload="{script}"></iframe>'
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
    ]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found is not None, done.stdout[:500]
    assert width - 20 < int(found.group(2)) <= width, "a scrollbar may take some"
    assert found.group(1) == found.group(2)


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
