"""The plugin API as a list: what it names, what it costs to import, and that it changes on purpose only."""

from __future__ import annotations

import ast
import subprocess
import sys
from abc import abstractmethod
from pathlib import Path

import pytest
from packaging.version import Version

import sglang_core
from sglang_core import api
from sglang_core.api import lock
from sglang_core.backend.version import comparable_version


def test_every_name_is_there_and_typed() -> None:
    """`__all__`, the lazy names and what type checkers see are one list."""
    source = ast.parse(Path(api.__file__).read_text())
    checked = next(n for n in source.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {alias.asname: (n.module, alias.name) for n in checked.body for alias in n.names}
    assert set(typed) == set(api.__all__)
    for name, (module, original) in typed.items():
        assert original == name
        assert getattr(api, name) is getattr(sys.modules[module], name)
    assert dir(api) == api.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Bakend'"):
        _ = api.Bakend


def test_importing_the_api_imports_no_torch() -> None:
    code = "import sys, sglang_core.api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", lock.MODULES)
def test_star_imports_work(module: str) -> None:
    names: dict[str, object] = {}
    exec(f"from {module} import *", names)
    assert set(sys.modules[module].__all__) <= names.keys()


def test_the_api_is_as_locked() -> None:
    differences = lock.differences()
    assert not differences, (
        "the plugin API differs from sglang_core/api/signatures.lock:\n"
        + "\n".join(differences)
        + "\n\nIf that is meant: run `python -m sglang_core.api.lock --write`; a name that went or changed its meaning also needs"
        " a new minor version (API_VERSION in backend/version.py and version in pyproject.toml)."
    )


def test_a_changed_signature_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    @abstractmethod
    def probe(self, deep: bool = False) -> list[int]:
        return []

    monkeypatch.setattr(api.Backend, "probe", probe)
    assert "+Backend.probe(self, deep: bool = False) -> list[int] abstract" in lock.differences()


def test_the_api_version_is_the_cores_major_minor() -> None:
    core = comparable_version()
    assert f"{core.major}.{core.minor}" == api.API_VERSION
    assert Version(sglang_core.__version__).base_version == str(core)
