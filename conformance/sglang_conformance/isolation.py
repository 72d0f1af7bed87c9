"""Case groups in processes of their own: a kernel that crashes or hangs fails the case that it was in, and no other.

The calling process must not have opened a device or run a parallel region: its children are forks of it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from sglang_conformance.profiles import COMM
from sglang_conformance.result import Result
from sglang_conformance.runner import Suite, Work

CASE_LIMIT = 300.0  # seconds; the slowest case takes a few on an idle core


def groups(work: Iterable[Work]) -> list[list[Work]]:
    """The cases of an op are a group; so are all collectives, which share the process that starts their ranks."""
    by_op: dict[str, list[Work]] = {}
    for case, dtype in work:
        by_op.setdefault(COMM if case.op.startswith(COMM) else case.op, []).append((case, dtype))
    return list(by_op.values())


def run_isolated(suite: Suite, work: Iterable[Work], *, limit: float = CASE_LIMIT, jobs: int = 1) -> Iterator[Result]:
    """One result for each of `work`: `jobs` groups at a time, `limit` seconds a case."""
    waiting = deque(groups(work))
    running: list[_Child] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Child(suite, waiting.popleft()))
            deadline = min(child.started for child in running) + limit
            ready = select.select([child.fd for child in running], [], [], max(0.0, deadline - time.monotonic()))[0]
            for child in list(running):
                if child.fd in ready and (found := child.read()) is not None:
                    yield from found
                    continue
                if child.fd not in ready and time.monotonic() < child.started + limit:
                    continue
                running.remove(child)
                how = child.end() if child.fd in ready else child.kill(f"did not end within {limit:g} s")
                if child.left:
                    yield suite.failed(*child.left[0], how)
                    if rest := child.left[1:]:
                        waiting.appendleft(rest)
    finally:
        for child in running:
            child.kill("")


class _Child:
    """A fork that judges `work` and writes a line for each result. `started`: when the case it is in began."""

    def __init__(self, suite: Suite, work: list[Work]) -> None:
        self.left, self.started, self._text = list(work), time.monotonic(), b""
        sys.stdout.flush()
        self.fd, out = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self.fd)
            _judge_all(suite, work, out)
        os.close(out)

    def read(self) -> list[Result] | None:
        """The results that have arrived; None at the end."""
        chunk = os.read(self.fd, 1 << 16)
        if not chunk:
            return None
        *lines, self._text = (self._text + chunk).split(b"\n")
        found = [Result.from_json(json.loads(line)) for line in lines]
        if found:
            self.left, self.started = self.left[len(found) :], time.monotonic()
        return found

    def end(self) -> str:
        """Wait for it, and say how it ended."""
        os.close(self.fd)
        status = os.waitpid(self._pid, 0)[1]
        if os.WIFSIGNALED(status):
            return f"the process was killed by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"the process ended with status {os.waitstatus_to_exitcode(status)}"

    def kill(self, why: str) -> str:
        os.kill(self._pid, signal.SIGKILL)
        self.end()
        return why


def _judge_all(suite: Suite, work: list[Work], out: int) -> Any:
    """The child's whole life. It leaves without Python's exit, which belongs to the parent."""
    status = 1
    try:
        for case, dtype in work:
            line = json.dumps(suite.judge(case, dtype).to_json()) + "\n"
            data = line.encode()
            while data:
                data = data[os.write(out, data) :]
        suite.close()
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
