"""`pytest --pyargs sglang_conformance --device NAME`: every case as a test. Loaded by every pytest; silent in all others.

Verdicts other than PASS and FAIL are counted by their own names: what a waiver excuses or nothing claims is no plain skip.
`-k`, `--lf` and xdist's `-n` work as usual. A crash takes pytest with it, or xdist's worker: `sglang-conformance run` does not mind.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sglang_conformance.runner import Suite

DECLARED = pytest.StashKey[bool]()  # set on a test that skips because the claims or a waiver say so
VERDICT = "conformance_verdict"  # a test's property: it reaches reports, xdist's controller and JUnit's XML
MARKS = {"REFERENCE": "r", "NOT_CLAIMED": "-", "EMULATED": "e", "WAIVED": "W"}  # verdict -> its letter of progress
MODULE = "sglang_conformance.test_device"
WORKER = "SGLANG_CONFORMANCE_WORKER"  # tells xdist's workers, which have another command line, what this run is


def pytest_addoption(parser: pytest.Parser) -> None:
    if not any("sglang_conformance" in arg for arg in sys.argv[1:]) and WORKER not in os.environ:
        return  # `--device` is a name that other suites want too
    os.environ[WORKER] = "1"
    group = parser.getgroup("sglang conformance")
    group.addoption("--device", default="cpu", help="backend name, or name:index (default cpu)")
    group.addoption("--conformance-seed", type=int, default=0, help="seed of every case's numbers")
    group.addoption("--conformance-full", action="store_true", help="long cases too")
    group.addoption("--conformance-strict", action="store_true", help="what works and is not claimed fails")


@pytest.fixture(scope="session", name="conformance_suite")
def _suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    from sglang_conformance.runner import Suite  # torch: not for every pytest of this environment
    from sglang_core.backend.devices import open_device

    option = request.config.getoption
    chosen = open_device(option("--device"))
    suite = Suite(chosen.backend, chosen.info, seed=option("--conformance-seed"), strict=option("--conformance-strict"))
    yield suite
    suite.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__ == MODULE and "case" in metafunc.fixturenames:
        from sglang_conformance.case import all_cases

        full = metafunc.config.getoption("--conformance-full", default=False)
        cases = [case for case in all_cases() if full or not case.full]
        pairs = [(case, dtype) for case in cases for dtype in case.dtypes]
        metafunc.parametrize(("case", "dtype"), pairs, ids=[case.title(dtype) for case, dtype in pairs])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A case that is skipped by a mark, by a conftest or by itself fails: only claims and waivers excuse."""
    report = yield
    if (
        report.skipped
        and getattr(getattr(item, "module", None), "__name__", "") == MODULE
        and DECLARED not in item.stash
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped, and neither a claim nor a waiver says so: {report.longrepr}"
    return report


def verdict_of(report: pytest.TestReport) -> str:
    """ "" where it is no case of this suite, or no verdict was reached."""
    return str(dict(report.user_properties).get(VERDICT, ""))


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
    """(category of the last line, letter, word of -v) of what is neither PASS nor FAIL."""
    verdict = verdict_of(report) if report.when == "call" and not report.failed else ""
    if verdict not in MARKS:
        return None
    return verdict.lower(), MARKS[verdict], (verdict, {"yellow" if verdict == "WAIVED" else "cyan": True})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each waived failure with its URL and its last day, whatever -r says."""
    if waived := terminalreporter.getreports("waived"):
        terminalreporter.section(f"{len(waived)} failures are waived", yellow=True)
        for report in waived:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            terminalreporter.line(f"{report.nodeid.rpartition('::')[2]}: {reason}")
