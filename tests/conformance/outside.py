"""An environment outside of the repository, with the built wheels of its packages: where a vendor works."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

from sglang_core.backend.discovery import BACKENDS, PLUGINS, plugin_entries

REPO = Path(__file__).parents[2]
COMMANDS = ("pytest", "twine")  # from packages of this environment that a fresh one has no scripts of


def environment(folder: Path, *, name: str) -> dict[str, str]:
    """Of shell commands in a fresh virtual environment that has the wheels, and of this one what they depend on.

    Folders on its path are plain: what is installed here in editable mode cannot be imported there. Plugins other than
    sglang-`name` are off, and pip asks no index.
    """
    sources, wheels, env = folder / "sources", folder / "wheels", folder / "env"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "reports")
    for package in ("sglang_core", "conformance"):
        shutil.copytree(REPO / package, sources / package, ignore=skipped)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / file, sources / file)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    for source in (sources / "conformance", sources):
        subprocess.run([*pip, "--no-build-isolation", "-w", str(wheels), str(source)], check=True, timeout=600)
    venv.create(env, with_pip=False)
    (packages,) = env.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    for command in ("pip", *COMMANDS):
        script = env / "bin" / command
        script.write_text(f'#!/bin/sh\nexec "{env}/bin/python" -m {command} "$@"\n')
        script.chmod(0o755)
    others = {e.dist for group in (BACKENDS, PLUGINS) for e in plugin_entries(group)} - {
        "sglang-core",
        f"sglang-{name}",
    }
    shell = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PATH": f"{env}/bin:{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "SGLANG_DISABLE_PLUGINS": ",".join(sorted(others)),
        "COLUMNS": "200",
    }
    install = [str(env / "bin/python"), "-m", "pip", "install", "--quiet", "--force-reinstall"]
    subprocess.run([*install, *map(str, wheels.glob("*.whl"))], check=True, env=shell, timeout=600)
    return shell
