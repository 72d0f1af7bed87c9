"""`sglang-conformance plugin new`: what it writes, and that it works where there is no repository."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from sglang_conformance.cli import main

REPO = Path(__file__).parents[2]


def test_it_writes_a_package_of_that_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", "new", "zeta-one", "--directory", str(tmp_path)]) == 0
    folder = tmp_path / "sglang-zeta-one"
    assert str(folder) in capsys.readouterr().out
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {
        ".github/workflows/ci.yml",
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "sglang_zeta_one/__init__.py",
        "sglang_zeta_one/activation.py",
        "sglang_zeta_one/backend.py",
        "tests/test_activation.py",
    }
    for file in files:
        text = (folder / file).read_text()
        assert not any(word in text for word in ("@name@", "@module@", "@Class@", "@range@")), file
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["sglang-core>=0.1,<0.2"]
    assert project["entry-points"]["sglang_core.backends"] == {"zeta-one": "sglang_zeta_one.backend:ZetaOneBackend"}


@pytest.mark.parametrize("command", [("check", "--select", "E,F,I,UP,B"), ("format", "--check")])
def test_what_it_writes_is_clean(command: tuple[str, ...], tmp_path: Path) -> None:
    assert main(["plugin", "new", "zeta", "--directory", str(tmp_path)]) == 0
    ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "120"]
    done = subprocess.run(ruff, cwd=tmp_path / "sglang-zeta", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["", "Zeta", "1st", "my_chip", "-a", "a--b", "cpu", "auto", "../x"])
def test_a_name_that_will_not_do_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", "new", f"--directory={tmp_path}", "--", name]) == 2
    assert "no name for a device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sglang-zeta").mkdir()
    assert main(["plugin", "new", "zeta", "--directory", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """Environment of a fresh virtual environment with this repository's wheels in it, and what they depend on from here.

    Folders on its path are plain: what is installed here in editable mode cannot be imported there.
    """
    sources, wheels, env = tmp_path / "sources", tmp_path / "wheels", tmp_path / "env"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "reports")
    for name in ("sglang_core", "conformance"):
        shutil.copytree(REPO / name, sources / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, sources / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    for folder in (sources / "conformance", sources):
        subprocess.run([*pip, "--no-build-isolation", "-w", str(wheels), str(folder)], check=True, timeout=240)
    venv.create(env, with_pip=False)
    (packages,) = env.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    shell = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PATH": f"{env}/bin:{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_DEPS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "SGLANG_DISABLE_PLUGINS": "sglang-xeon,sglang-acme",
        "COLUMNS": "200",
    }
    install = [str(env / "bin/python"), "-m", "pip", "install", "--quiet", "--force-reinstall"]
    subprocess.run([*install, *map(str, wheels.glob("*.whl"))], check=True, env=shell, timeout=240)
    return shell


SCRIPT = """
set -e
sglang-conformance plugin new zeta
python -m pip install --quiet ./sglang-zeta
python -m pytest -q -p no:cacheprovider sglang-zeta/tests
sglang-core devices
sglang-core generate --model-path demo --device zeta "The capital of France is"
sglang-core explain --model-path demo --device zeta
sglang-conformance run zeta --full --strict --num-threads 1 --jobs 2 --json report.json --html report.html
sglang-conformance verify report.json
python -c "import sglang_core, sglang_conformance; print(sglang_core.__path__, sglang_conformance.__path__)"
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_scaffold_conforms_outside_of_the_repository(outside: dict[str, str], tmp_path: Path) -> None:
    where = tmp_path / "vendor"
    where.mkdir()
    done = subprocess.run(
        ["bash", "-c", SCRIPT], cwd=where, env=outside, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "zeta:0" in done.stdout
    assert "Paris" in done.stdout
    assert "zeta conforms" in done.stdout
    assert str(REPO) not in done.stdout.splitlines()[-1]
    assert (where / "report.html").read_text().startswith("<!doctype html>")
