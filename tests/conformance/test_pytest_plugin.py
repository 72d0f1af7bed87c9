"""The suite as a vendor's CI runs it: `pytest --pyargs sglang_conformance --device NAME`, in a folder of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SKIP_ALL = """
import pytest
def pytest_collection_modifyitems(items):
    for item in items:
        if "norm.layer[bias" in item.name:
            item.add_marker(pytest.mark.skip(reason="flaky here"))
"""


WHICH = ("-k", "norm.layer and bias and not strided and not alone")


def rooted(folder: Path) -> tuple[str, ...]:
    """pytest's own folder, with its conftest."""
    return ("--rootdir", str(folder), "-p", "conftest", "-c", "pytest.ini")


def run(folder: Path, *args: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "--pyargs", "sglang_conformance", "--device", "cpu", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


# A backend that claims what it has no kernel for, and has that waived.
WAIVES = """
from sglang_core.backend.claims import Claim, Claims, Waiver
from sglang_core.backend.cpu import CpuBackend
waiver = Waiver(cases="norm.layer[*", reason="known", url="https://example.com/7", expires="2999-12-31")
CpuBackend.claims = lambda self, ctx: Claims((Claim(op="norm.layer"),), waivers=(waiver,))
"""


def test_a_case_is_a_test_and_each_verdict_is_counted_by_its_name(tmp_path: Path) -> None:
    code, out = run(tmp_path, *WHICH)
    assert code == 0, out
    assert "4 reference" in out and "2 not_claimed" in out  # in the order in which they arrive
    assert "skipped" not in out
    _, out = run(tmp_path, *WHICH, "-v")
    assert re.search(r"norm\.layer\[bias-float16\]\]? NOT_CLAIMED", out), out


@pytest.mark.parametrize("more", [(), ("-n", "2")])
def test_a_waived_failure_is_shown_with_its_url(more: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(WAIVES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    code, out = run(tmp_path, *rooted(tmp_path), *WHICH, *more)
    assert code == 0, out
    assert "6 waived" in out
    assert "6 failures are waived" in out
    assert "until 2999-12-31, https://example.com/7 (known)" in out


def test_a_skip_by_mark_fails_and_lf_runs_what_failed(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(SKIP_ALL)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    rootdir = rooted(tmp_path)
    code, out = run(tmp_path, *rootdir, *WHICH)
    assert code == 1, out
    assert "3 errors" in out
    assert "neither a claim nor a waiver says so" in out
    (tmp_path / "conftest.py").write_text("")
    code, out = run(tmp_path, *rootdir, "--lf", "-k", "norm.layer")
    assert code == 0, out
    assert "2 reference, 1 not_claimed" in out


def test_it_runs_under_xdist(tmp_path: Path) -> None:
    code, out = run(tmp_path, "-n", "2", *WHICH)
    assert code == 0, out
    assert "2 workers" in out
    assert "4 reference" in out and "2 not_claimed" in out  # in the order in which they arrive
