"""`sglang-conformance plugin new`: what it writes. The plugin guide's test runs it where there is no repository."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from sglang_conformance.cli import main


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
