"""`run --perf`: the figures are taken by a process of its own, which may crash or hang and takes no verdict with it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sglang_conformance.perf.measure import LIMIT

PATIENCE = 75.0  # seconds that it may take beyond its limit: probes, and the load that it is in


def measured(device: str, *, num_threads: int | None, limit: float = LIMIT) -> dict[str, Any]:
    """What `sglang-conformance perf DEVICE --json` writes, or {"error": why there is none}."""
    threads = [] if num_threads is None else ["--num-threads", str(num_threads)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "perf.json"
        flags = ["--json", str(path), f"--limit={limit}", *threads]
        command = [sys.executable, "-m", "sglang_conformance.cli", "perf", device, *flags]
        patience = max(0.0, limit) + PATIENCE
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=patience, check=False, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return {"error": f"did not end within {patience:g} s"}
        if done.returncode:
            words = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            return {"error": f"the process ended with status {done.returncode}: {words}"}
        found: dict[str, Any] = json.loads(path.read_text())
        return found
