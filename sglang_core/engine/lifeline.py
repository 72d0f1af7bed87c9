"""No orphans: a child holds the read end of a pipe whose write end only its parent has, and ends when it closes.

A pipe closes however the parent dies, SIGKILL included, on every POSIX system and across re-parenting.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def die_with_parent() -> bytes:
    """Read the launch message from stdin up to its newline, then watch stdin from a thread and end this process at EOF."""
    message = sys.stdin.buffer.readline()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGKILL)  # at once: device threads may be deep in a kernel

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    return message
