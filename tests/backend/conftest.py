"""Fake installed packages, written to a folder on sys.path: metadata, entry points and modules, as pip would leave them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(dist, entry_points={group: {name: target}}, modules={name: source}, requires=...)."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def install_dist(
        dist: str,
        *,
        entry_points: Mapping[str, Mapping[str, str]],
        modules: Mapping[str, str],
        requires: tuple[str, ...] = ("sglang-core>=0.1,<0.2",),
        version: str = "1.0",
    ) -> None:
        info = site / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {dist}",
            f"Version: {version}",
            *(f"Requires-Dist: {r}" for r in requires),
        ]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(
            "".join(
                f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in targets.items())
                for group, targets in entry_points.items()
            )
        )
        for name, source in modules.items():
            (site / f"{name}.py").write_text(source)
        importlib.invalidate_caches()

    yield install_dist
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        if str(getattr(module, "__file__", "")).startswith(str(site)):
            del sys.modules[name]
    importlib.invalidate_caches()
