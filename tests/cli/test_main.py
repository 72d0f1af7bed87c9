"""The command itself: what it imports, how it fails, what it suggests."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from sglang_core import __version__
from sglang_core.cli.main import COMMANDS

from .conftest import Cli

HEAVY = ("torch", "transformers", "pydantic", "fastapi", "rich", "numpy", "httpx", "msgspec", "yaml")


def imported_by(code: str) -> set[str]:
    """Heavy modules in a fresh interpreter that ran `code`."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split("LOADED", 1)[1].split()) & set(HEAVY)


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], [], ["bench", "--help"], ["serve", "--help"], ["serve", "--help-all"]]
)
def test_help_and_version_import_nothing_heavy(argv: list[str]) -> None:
    assert imported_by(f"from sglang_core.cli.main import main; main({argv!r})") == set()


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"bench"}))
def test_help_of_every_command_needs_no_torch(command: str) -> None:
    assert not imported_by(f"from sglang_core.cli.main import main; main([{command!r}, '--help'])") & {
        "torch",
        "transformers",
    }


def test_the_package_and_its_config_import_nothing_heavy() -> None:
    assert imported_by("import sglang_core, sglang_core.config") == set()


def test_python_m_runs_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_core", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"sglang-core {__version__}\n"


def test_launch_server_is_serve() -> None:
    argv = [sys.executable, "-m", "sglang_core.launch_server", "--model-path", "demo", "--port", "99999"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sglang-core serve: error: --port 99999 must be between 0 and 65535\n"


def test_help_lists_every_command(cli: Cli) -> None:
    out = cli("--help").out
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_no_arguments_is_help_and_wrong_usage(cli: Cli) -> None:
    outcome = cli()
    assert outcome.status == 2
    assert outcome.out.startswith("usage: sglang-core")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sreve"], "sglang-core: error: unknown command 'sreve'; did you mean serve?"),
        (["zzz"], "it is one of serve, generate, chat"),
        (["bench", "offlin"], "did you mean offline?"),
        (["serve", "--modle-path", "demo"], "unknown flag --modle-path; did you mean --model-path?"),
        (["serve", "--model_path=demo"], "unknown flag --model_path; did you mean --model-path?"),
        (["serve", "--zzzz"], "unknown flag --zzzz; see sglang-core serve --help-all"),
        (["serve", "demo"], "unexpected argument 'demo'; did you mean --model-path demo?"),
        (["serve", "--port"], "--port: expected one argument"),
        (["devices", "--jsn"], "unknown flag --jsn; did you mean --json?"),
    ],
)
def test_wrong_usage_is_one_line_with_the_way_out(cli: Cli, argv: list[str], words: str) -> None:
    outcome = cli(*argv)
    assert outcome.status == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_help_all_shows_more_than_help(cli: Cli) -> None:
    short, full = cli("serve", "--help").out, cli("serve", "--help-all").out
    assert "--watchdog-timeout" not in short
    assert "--watchdog-timeout" in full
    assert "--help-all" in short


def test_help_shows_about_25_settings(cli: Cli) -> None:
    flags = [line.split()[0] for line in cli("serve", "--help").out.splitlines() if line.startswith("  --")]
    assert 20 <= len(flags) <= 30


def test_version_lists_the_plugins(cli: Cli) -> None:
    outcome = cli("version")
    assert outcome.status == 0
    assert re.search(rf"^sglang-core +{re.escape(__version__)}$", outcome.out, re.MULTILINE)
    assert "plugin API" in outcome.out
