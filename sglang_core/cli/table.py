"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 200  # a pipe has no width of its own
STYLES = {
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
    "failed": "red",
    "absent": "dim",
    "disabled": "dim",
    "REFERENCE": "yellow",
}


def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, soft_wrap=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print rows under their columns. A column whose name ends in '>' is set to the right; a known status has a colour."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell), style=STYLES.get(str(cell), "")) for cell in row))
    out = console()
    if title:
        out.print(Text(title, style="bold"))
    out.print(table)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
