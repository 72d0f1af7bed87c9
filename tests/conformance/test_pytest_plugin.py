"""The suite as a vendor's CI runs it: `pytest --pyargs sglang_conformance --device NAME`, in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SKIP_ALL = """
import pytest
def pytest_collection_modifyitems(items):
    for item in items:
        if "norm.layer[bias" in item.name:
            item.add_marker(pytest.mark.skip(reason="flaky here"))
"""


def run(folder: Path, *args: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "--pyargs", "sglang_conformance", "--device", "cpu", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_case_is_a_test_and_what_is_declared_unsupported_a_skip(tmp_path: Path) -> None:
    code, out = run(tmp_path, "-k", "norm.layer and bias")
    assert code == 0, out
    assert "4 passed, 2 skipped" in out


def test_a_skip_by_mark_fails_and_lf_runs_what_failed(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(SKIP_ALL)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    rootdir = ("--rootdir", str(tmp_path), "-p", "conftest", "-c", "pytest.ini")
    code, out = run(tmp_path, *rootdir, "-k", "norm.layer and bias")
    assert code == 1, out
    assert "3 errors" in out
    assert "neither a claim nor a waiver says so" in out
    (tmp_path / "conftest.py").write_text("")
    code, out = run(tmp_path, *rootdir, "--lf", "-k", "norm.layer")
    assert code == 0, out
    assert "2 passed, 1 skipped" in out


def test_it_runs_under_xdist(tmp_path: Path) -> None:
    code, out = run(tmp_path, "-n", "2", "-k", "norm.layer and bias")
    assert code == 0, out
    assert "2 workers" in out
    assert "4 passed, 2 skipped" in out
