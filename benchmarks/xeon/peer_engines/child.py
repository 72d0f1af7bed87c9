"""A child engine as the parent sees it: started with a job, asked a question at a time, never waited for without a bound."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STOP_GRACE = 20.0


class ChildError(RuntimeError):
    """The child failed, or took too long."""


class Child:
    """One engine process and all that it starts. Use it as a context manager."""

    def __init__(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], job: Mapping[str, Any], *, log: Path, start: float
    ) -> None:
        """Returns when the child says that it is ready; `ready` is how long that took. Raises ChildError after `start` seconds."""
        self.name, self._log = name, log
        began = time.perf_counter()
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(env),
                text=True,
                start_new_session=True,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.ask(job, start)
        except ChildError:
            self.close()
            raise
        self.ready = time.perf_counter() - began

    def ask(self, question: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout)
        except (queue.Empty, OSError):
            line = ""
        if not line:
            raise ChildError(f"{self.name} gave no answer within {timeout:.0f} s:\n{self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Its input ends, then it has some seconds, then its whole session is killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(STOP_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # it has ended

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
