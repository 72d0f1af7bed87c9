"""A progress bar over bytes, where there is a terminal to draw it on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


@contextmanager
def byte_bar(wanted: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what to call with the bytes just done: a progress bar on a terminal, elsewhere nothing."""
    if not (wanted and sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)):
        yield lambda num_bytes: None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
