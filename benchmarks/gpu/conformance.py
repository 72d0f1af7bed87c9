"""Part `conformance`: the suite on the device, groups of cases in processes of their own, several at a time, those of the costly ops first."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType

import torch
from sglang_conformance.case import Case
from sglang_conformance.isolation import run_isolated
from sglang_conformance.runner import Result, Suite, Verdict, Work

from benchmarks.gpu.opened import ASKED_FOR
from benchmarks.gpu.session import SUMMARY, Facts, Session
from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.interface import KernelContext
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.providers import Providers, collect_kernels

FIRST = ("attn.", "moe.", "gemm.", "graph.", "sample.", "kv.", "norm.", "rope.", "runtime.")
SMALL = ("norm.rms[", "act.gated[")
CASE_LIMIT = 90.0  # seconds: kernels are compiled in them
FIRST_CHOICE = 1000  # a priority above all others
MOST_JOBS = 8  # processes with a context each; what most of their time goes to is compiling, on the host
ANEW = 75  # the status by which a process says that it wants to be followed by another
FOLLOWED = f"the process ended with status {ANEW}"  # how `run_isolated` puts it


class TimeOverError(Exception):
    """Of this run; cases under way belong to the next."""


class DeviceSuite(Suite):
    """Ends its process where the case before failed: an illegal address takes a CUDA context with it, and every later case would fail too.

    The case that was to be next is then given FOLLOWED as its reason, which is no verdict: it is run once more.
    """

    _failed = False

    def judge(self, case: Case, dtype: torch.dtype) -> Result:
        if self._failed:
            os._exit(ANEW)
        result = super().judge(case, dtype)
        self._failed = result.verdict in (Verdict.FAIL, Verdict.WAIVED)
        return result


def select(suite: Suite, only: str, *, small: bool) -> list[Work]:
    """In the order in which they tell most."""
    work = suite.select([only] if only else SMALL if small else ())

    def rank(pair: Work) -> int:
        op = pair[0].op
        return next((i for i, prefix in enumerate(FIRST) if op.startswith(prefix)), len(FIRST))

    return sorted(work, key=rank)


def promoted(kernels: list[Kernel], provider: str) -> tuple[list[Kernel], set[str]]:
    """The kernels with those of `provider` before all others, and the ops that these are of."""
    ops = {kernel.op for kernel in kernels if kernel.provider == provider}
    return [replace(k, priority=FIRST_CHOICE) if k.provider == provider else k for k in kernels], ops


def suites(chosen: ChosenDevice, only: str, *, small: bool) -> list[tuple[str, Suite, list[Work]]]:
    """What is run: the prefix of its titles, how kernels are chosen, and its cases. First the device as models get it, then with each provider of `ASKED_FOR` as the first choice."""
    suite = DeviceSuite(chosen.backend, chosen.info, full=False)
    work = select(suite, only, small=small)
    found = [("", suite, work)]
    kernels = collect_kernels(chosen.backend, KernelContext(device=chosen.info), Providers())
    for provider in ASKED_FOR:
        first, ops = promoted(kernels, provider)
        cases = [(case, dtype) for case, dtype in work if case.op in ops]
        if cases:
            found.append((f"{provider}: ", DeviceSuite(chosen.backend, chosen.info, kernels=first, full=False), cases))
    return found


def run(
    chosen: ChosenDevice, session: Session, only: str = "", *, small: bool, say: Callable[[str], None] = print
) -> bool:
    """True where no case is left. The device is opened by children only: this process forks."""
    found = suites(chosen, only, small=small)
    jobs = min(MOST_JOBS, max(1, len(os.sched_getaffinity(0)) // 2))
    with suppress(TimeOverError), time_limit(max(session.left, CASE_LIMIT)):
        for prefix, suite, work in found:
            while todo := [(c, dtype) for c, dtype in work if prefix + c.title(dtype) not in session.done]:
                judge(suite, todo, prefix, session, say, jobs)
    left = sum(prefix + case.title(dtype) not in session.done for prefix, _, work in found for case, dtype in work)
    session.done[SUMMARY] = summary(session, total=sum(len(work) for _, _, work in found))
    session.save()
    say(f"{session.done[SUMMARY]['verdicts']}, {left} of {session.done[SUMMARY]['of']} left")
    return left == 0


def judge(suite: Suite, work: list[Work], prefix: str, session: Session, say: Callable[[str], None], jobs: int) -> None:
    """All of them, but for those that were to be next in a process that failed. At least one is, however little time there is."""
    results = run_isolated(suite, work, limit=CASE_LIMIT, jobs=jobs)
    try:
        for result in results:
            if result.reason.endswith(FOLLOWED):
                continue
            title = prefix + result.title
            session.record(title, result.to_json() | {"title": title})
            if result.verdict.value == "FAIL":
                say(f"FAIL {title}: {result.reason}")
            if session.left < 0:
                raise TimeOverError
    finally:
        results.close()  # ends the children that are under way


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeOverError in what is run inside, wherever it waits, once so many seconds are over."""

    def over(signum: int, frame: FrameType | None) -> None:
        raise TimeOverError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def summary(session: Session, total: int) -> Facts:
    """Verdicts so far, and what fails."""
    results = [facts for name, facts in session.done.items() if name != SUMMARY]
    verdicts = Counter(facts["verdict"] for facts in results)
    failed = {facts["title"]: facts.get("reason", "") for facts in results if facts["verdict"] == "FAIL"}
    return {"verdicts": dict(verdicts), "ran": len(results), "of": total, "fails": failed}
