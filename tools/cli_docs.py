"""Writes the tables of docs/cli.md that follow from the code. `--check` only says whether they are up to date.

usage: python tools/cli_docs.py [--check]
"""

from __future__ import annotations

import sys

from marked_docs import main

from sglang_core.cli.main import COMMANDS
from sglang_core.cli.settings import flag_names
from sglang_core.cli.sglang_flags import UNSUPPORTED
from sglang_core.config import all_settings


def settings_table() -> str:
    """Every flag, grouped by its owner."""
    lines = ["| flag | owner | default | what it does |", "|---|---|---|---|"]
    for branch, spec in all_settings():
        names = flag_names(spec)
        if spec.default is True:
            names.append(f"--no-{names[0][2:]}")
        flags = ", ".join(f"`{name}`" for name in names)
        default = {None: "auto", "": "", (): "", False: "off", True: "on"}.get(spec.default, f"`{spec.default}`")
        text = spec.metadata["help"].replace("|", "\\|")
        if spec.metadata["choices"]:
            text += f" ({', '.join(spec.metadata['choices'])})"
        lines.append(f"| {flags} | {branch} | {default} | {text} |")
    return "\n".join(lines)


def commands_table() -> str:
    lines = ["| command | what it does |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {text} |" for name, text in COMMANDS.items())])


def unsupported_table() -> str:
    """SGLang's flags that this project does not have, by what to do about them."""
    by_reason: dict[str, list[str]] = {}
    for flag, reason in UNSUPPORTED.items():
        by_reason.setdefault(reason, []).append(f"`{flag}`")
    lines = ["| SGLang flags | what to do |", "|---|---|"]
    return "\n".join([*lines, *(f"| {' '.join(flags)} | {reason} |" for reason, flags in by_reason.items())])


TABLES = {"commands": commands_table, "flags": settings_table, "sglang-flags": unsupported_table}


if __name__ == "__main__":
    sys.exit(main("cli.md", "cli_docs.py", TABLES))
