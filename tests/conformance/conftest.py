from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def pytester_free_run(tmp_path: Path) -> tuple[int, str]:
    """`pytest --pyargs sglang_conformance` in a process of its own, on a few cases."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "sglang_conformance", "--device", "cpu", "-k", "logits.mask"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr
