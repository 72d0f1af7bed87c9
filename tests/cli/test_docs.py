"""docs/cli.md follows the code: every flag and command is in it, and its tables are those that the tool writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_core.cli.bench import KINDS
from sglang_core.cli.main import COMMANDS
from sglang_core.cli.settings import flag_names
from sglang_core.config import all_settings

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "cli.md").read_text()


@pytest.mark.parametrize("flag", [name for _, spec in all_settings() for name in flag_names(spec)])
def test_every_flag_is_documented(flag: str) -> None:
    assert f"`{flag}`" in DOCS


@pytest.mark.parametrize("command", [*(c for c in COMMANDS if c != "bench"), *(f"bench {kind}" for kind in KINDS)])
def test_every_command_has_its_section(command: str) -> None:
    assert f"\n## {command}\n" in DOCS


def test_tables_are_up_to_date() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "cli_docs.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
