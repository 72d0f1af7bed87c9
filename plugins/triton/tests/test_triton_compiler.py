"""Which Triton is installed, under which of its names, and what is said where it is not the right one."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from sglang_triton import compiler

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
INSTALL = "pip install torch from there"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, for the test to fill."""
    there: dict[str, str] = {}

    def version_of(package: str) -> str:
        if package not in there:
            raise PackageNotFoundError(package)
        return there[package]

    monkeypatch.setattr(compiler, "version", version_of)
    return there


@pytest.mark.parametrize(
    "package, release",
    [("triton", "3.6.0"), ("triton", "3.9.0"), ("triton-rocm", "3.6.0"), ("pytorch-triton-rocm", "3.7.1"),
     ("triton", "3.6.0+rocm7.1.0.gitabcdef12"), ("triton", "3.8.0.dev20260901")],
)  # fmt: skip
def test_taken(packages: dict[str, str], package: str, release: str) -> None:
    packages[package] = release
    assert compiler.installed() == {package: release} and compiler.problem(INSTALL) == ""


@pytest.mark.parametrize(
    "there, said",
    [
        ({}, "Triton is not installed"),
        ({"triton": "3.5.1"}, "triton 3.5.1 is installed"),
        ({"triton-rocm": "3.10.0"}, "triton-rocm 3.10.0 is installed"),
        ({"triton": "3.9.0", "triton-rocm": "3.6.0"}, "pip uninstall triton triton-rocm"),
    ],
)
def test_refused(packages: dict[str, str], there: dict[str, str], said: str) -> None:
    packages |= there
    assert said in compiler.problem(INSTALL) and INSTALL in compiler.problem(INSTALL)


def test_pip_lays_none_over_that_of_pytorch() -> None:
    """Nothing asks for the package `triton` but the extra for hosts, which names the releases that kernels are written for."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    assert {Requirement(line).name for line in project["dependencies"]} == {"sglang-core"}
    (extra,) = map(Requirement, project["optional-dependencies"]["triton"])
    assert extra.name == "triton" and str(extra.specifier) == ",".join(
        sorted(compiler.RELEASES.split(","), reverse=False)
    )


def test_the_one_here_is_taken() -> None:
    assert version("triton") in compiler.installed().values() and not compiler.problem(INSTALL)
