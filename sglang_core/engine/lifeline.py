"""No orphans: a child holds the read end of a pipe whose write end only its parent has, and ends when it closes.

A pipe closes however the parent dies, SIGKILL included, on every POSIX system and across re-parenting. A process that the parent
forked without exec (multiprocessing) holds the write end too and may outlive it, so the child also looks who its parent is.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import threading
from pathlib import Path

LOOK_SECONDS = 1.0  # between two looks at who the parent is


def read_launch() -> bytes:
    """The launch message: the first line of stdin."""
    return sys.stdin.buffer.readline()


def die_with_parent(directory: Path) -> None:
    """End this process, and remove `directory`, as soon as its parent has ended."""
    parent, stdin = os.getppid(), sys.stdin.fileno()

    def watch() -> None:
        while os.getppid() == parent:
            if select.select([stdin], [], [], LOOK_SECONDS)[0] and not os.read(stdin, 4096):
                break
        shutil.rmtree(directory, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)  # at once: device threads may be deep in a kernel

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
