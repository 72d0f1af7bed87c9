"""docs/ops.md follows the definitions: every op, what it takes, and the formats."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import marked_docs
import pytest

from sglang_core.ops import OPS
from sglang_core.ops.registry import OpDef

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "ops_docs.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return importlib.import_module(TOOL.stem)  # pytest's pythonpath has its folder


def test_it_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", OPS)
def test_every_op_says_what_it_takes_and_gives(name: str) -> None:
    """In the text of its section: shapes, and what of (a plan has none)."""
    text = (ROOT / "docs" / "ops.md").read_text()
    section = text.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    assert f"def {OPS[name].body.__name__}(" in section
    prose = section.rpartition("```")[2]
    assert len(prose) > 60
    assert name.endswith("plan") or "[" in prose


def test_a_changed_definition_would_be_seen(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def rms(x: int, *, slope: float = 2.0) -> int:
        """Says something else."""
        return x

    monkeypatch.setitem(tool.OPS, "norm.rms", OpDef(name="norm.rms", body=rms))
    changed = marked_docs.render((ROOT / "docs" / "ops.md").read_text(), "ops.md", TOOL.name, tool.PARTS)
    assert "def rms(x: int, *, slope: float = 2.0) -> int" in changed
    assert "Says something else." in changed


def test_a_long_signature_has_a_parameter_a_line(tool: ModuleType) -> None:
    definition = f"def f(a: dict[str, int], *, {'b' * 90}: tuple[int, ...] = (1, 2)) -> tuple[int, int]"
    assert tool.wrapped(definition) == (
        f"def f(\n    a: dict[str, int],\n    *,\n    {'b' * 90}: tuple[int, ...] = (1, 2),\n) -> tuple[int, int]"
    )
