"""Cases in a process of their own: one that crashes, hangs or leaves the device unusable is noted as failed, and the others go on in the next.

An illegal address takes a CUDA context with it, and a capture that broke off the allocator: nothing after it in that process is worth having.
So a process ends at the first failure, and the next one goes on. Processes are forks: who calls this must not have opened a device or run a parallel region.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from benchmarks.gpu.session import Case, Session

# How a process ends: no case left, no time left, for the next one to go on, by an error of ours.
OVER, LATER, AGAIN, BROKEN = 0, 3, 4, 5
START = 120.0  # seconds until the first case begins
GRACE = 20.0  # seconds beyond the limit of the run for the case under way
DYING = 30.0  # seconds that the driver may take to clear up behind a process
PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]


def run(
    session: Session, cases: Callable[[], Iterable[Case]], *, after: Callable[[], None] = lambda: None, say: Say = print
) -> bool:
    """As `Session.run`, one case at a time. `cases` and, after each case, `after` are called in the process that runs them.

    Raises RuntimeError where a process ends before its first case.
    """
    while True:
        child = _Child(session, cases, after, say)
        try:
            status, how = child.watch(session.left + GRACE)
        finally:
            child.kill()
        session.load()
        session.again.difference_update(child.begun)
        if how:
            name = " ".join(filter(None, session.begun))
            session.lost(how)
            say(f"{name or 'no case'}: {how}")
        if how and not child.begun:
            raise RuntimeError(f"the process that runs the cases has begun none: {how}")
        if status in (OVER, LATER):
            return status == OVER
        if child.first and child.first not in session.done:
            return True


class _Child:
    """A fork that runs what is left, until something fails. `begun`: cases so far; `first`: of these, what the others need."""

    def __init__(
        self, session: Session, cases: Callable[[], Iterable[Case]], after: Callable[[], None], say: Say
    ) -> None:
        self.begun: list[str] = []
        self.first = ""
        sys.stdout.flush()
        parent = os.getpid()
        self._fd, out = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._fd)
            os.setpgid(0, 0)  # what it starts is killed with it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                _live(session, cases, after, say, out)
            os._exit(BROKEN)
        with suppress(ProcessLookupError, PermissionError):  # both do it: whoever comes first
            os.setpgid(self._pid, self._pid)
        os.close(out)
        self._alive = True

    def watch(self, seconds: float) -> tuple[int | None, str]:
        """Until it ends, or is to be ended: its status, or why it has none. `seconds`: of the whole run."""
        started = time.monotonic()
        last = started + seconds
        deadline = started + START  # no time left is for it to say
        while select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (text := os.read(self._fd, 1 << 16)):
                return self._ended()
            started = time.monotonic()
            for told in map(json.loads, text.splitlines()):
                self.begun.append(told["name"])
                self.first = told["name"] if told["first"] else self.first
                deadline = min(started + told["most"], last)
        return None, f"killed, as it did not end within {time.monotonic() - started:.0f} s"

    def _ended(self) -> tuple[int | None, str]:
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._alive = False
        if code < 0:
            return None, f"killed its process by {signal.Signals(-code).name}"
        return (code, "") if code in (OVER, LATER, AGAIN) else (None, f"ended its process with status {code}")

    def kill(self) -> None:
        """With all that it started. Raises RuntimeError where the driver does not let go of it."""
        os.close(self._fd)
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        deadline = time.monotonic() + DYING
        while self._alive:
            self._alive = os.waitpid(self._pid, os.WNOHANG)[0] == 0
            if self._alive and time.monotonic() > deadline:
                raise RuntimeError(f"process {self._pid} was killed and does not end: the device hangs")
            time.sleep(0.05)


def _live(session: Session, cases: Callable[[], Iterable[Case]], after: Callable[[], None], say: Say, out: int) -> Any:
    """The child's whole life. It leaves without Python's exit, which belongs to the parent."""
    status = BROKEN
    try:
        status = _run(session, cases, after, say, out)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(session: Session, cases: Callable[[], Iterable[Case]], after: Callable[[], None], say: Say, out: int) -> int:
    for case in session.todo(cases()):
        if not session.has_time(case, say):
            return LATER
        session.begin(case.name)
        os.write(out, (json.dumps({"name": case.name, "most": case.most, "first": case.first}) + "\n").encode())
        if not session.attempt(case, say) or case.last:
            return AGAIN
        after()
    return OVER
