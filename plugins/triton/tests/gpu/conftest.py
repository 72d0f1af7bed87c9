"""The device `fakegpu`, installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_gpu import FakeGpuBackend, FakeGpuRuntime


@pytest.fixture
def fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], FakeGpuRuntime]:
    """-> a function that gives the runtime opened last."""
    info = tmp_path / "sglang_fakegpu-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sglang-fakegpu\nVersion: 1.0\nRequires-Dist: sglang-core>=0.1,<0.2\n"
    )
    (info / "entry_points.txt").write_text("[sglang_core.backends]\nfakegpu = fake_gpu:FakeGpuBackend\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return lambda: FakeGpuBackend.runtimes[-1]
