"""The plugin guide, as written: its files are created, its commands run, and it ends with this folder's package."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_core.backend.discovery import BACKENDS, PLUGINS, plugin_entries

HERE = Path(__file__).parent
REPO = HERE.parents[1]
BLOCK = re.compile(r"^```(?P<lang>\w+)(?: file=(?P<file>\S+))?\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[tuple[str, str | None, str]]:
    for match in BLOCK.finditer((REPO / "docs/plugin-guide.md").read_text()):
        yield match["lang"], match["file"], match["body"]


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """Environment of a fresh virtual environment that sees this one's packages; pip builds without the network."""
    env_dir = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env_dir)], check=True)
    (packages,) = env_dir.glob("lib/python*/site-packages")
    outer = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    (packages / "outer.pth").write_text("\n".join([*outer, str(REPO)]) + "\n")
    mains = {"pip": "", "sglang-core": "sglang_core.cli.main", "sglang-conformance": "sglang_conformance.cli"}
    for command, module in mains.items():
        run = f"from {module} import main; import sys; sys.exit(main())" if module else ""
        script = env_dir / "bin" / command
        script.write_text(
            f'#!/bin/sh\nexec "{env_dir}/bin/python" ' + (f'-c "{run}" "$@"\n' if run else f'-m {command} "$@"\n')
        )
        script.chmod(0o755)
    pip = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    others = {e.dist for group in (BACKENDS, PLUGINS) for e in plugin_entries(group)} - {"sglang-core", "sglang-acme"}
    pip["SGLANG_DISABLE_PLUGINS"] = ",".join(sorted(others))
    return os.environ | pip | {"PATH": f"{env_dir}/bin:{os.environ['PATH']}", "COLUMNS": "200"}


def test_the_guide_ends_with_this_package() -> None:
    files = {file: body for _, file, body in blocks() if file is not None}
    assert set(files) == {"pyproject.toml", "acme/__init__.py", "acme/backend.py", "acme/activation.py"}
    for file, body in files.items():
        assert body == (HERE / file).read_text(), f"{file} differs between docs/plugin-guide.md and tests/toy_vendor"


def test_the_guide_runs_as_written(shell: dict[str, str], tmp_path: Path) -> None:
    where, outputs = tmp_path, {}
    for lang, file, body in blocks():
        if file is not None:
            (where / file).write_text(body)
        elif lang == "bash":
            script = f"set -e\n{body}pwd > {tmp_path}/where\n"
            done = subprocess.run(
                ["bash", "-c", script], cwd=where, env=shell, capture_output=True, text=True, timeout=240, check=False
            )
            assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"
            where = Path((tmp_path / "where").read_text().strip())
            outputs[body] = done.stdout
    devices, first, explained = (out for body, out in outputs.items() if "sglang-core" in body and "mkdir" not in body)
    judged, published = (out for body, out in outputs.items() if "sglang-conformance" in body)
    assert re.search(r"act\.gated\W+\d+\W+acme", judged)
    assert "; conformant" in published
    assert {file.suffix for file in where.glob("dist/*")} == {".whl"}
    assert (where / "report.html").is_file()
    assert re.search(r"acme:0\s+acme/v1\s+Acme One", devices)
    assert "Paris" in first
    assert re.search(r"act\.gated.*acme", explained)
    assert "Paris" in explained
