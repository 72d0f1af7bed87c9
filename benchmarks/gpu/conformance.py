"""Part `conformance`: the suite on the device, a group of cases in a process of its own, those of the costly ops first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from sglang_conformance.isolation import run_isolated
from sglang_conformance.runner import Suite, Work

from benchmarks.gpu.opened import ASKED_FOR
from benchmarks.gpu.session import Facts, Session
from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.interface import KernelContext
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.providers import Providers, collect_kernels

FIRST = ("attn.", "moe.", "gemm.", "graph.", "sample.", "kv.", "norm.", "rope.", "runtime.")
SMALL = ("norm.rms[", "act.gated[")
SUMMARY = "summary"
CASE_LIMIT = 120.0  # seconds
FIRST_CHOICE = 1000  # a priority above all others
SPARE = 15.0  # seconds that are left for writing and for a case that is under way


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
    suite = Suite(chosen.backend, chosen.info, full=False)
    work = select(suite, only, small=small)
    found = [("", suite, work)]
    kernels = collect_kernels(chosen.backend, KernelContext(device=chosen.info), Providers())
    for provider in ASKED_FOR:
        first, ops = promoted(kernels, provider)
        cases = [(case, dtype) for case, dtype in work if case.op in ops]
        if cases:
            found.append((f"{provider}: ", Suite(chosen.backend, chosen.info, kernels=first, full=False), cases))
    return found


def run(
    chosen: ChosenDevice, session: Session, only: str = "", *, small: bool, say: Callable[[str], None] = print
) -> bool:
    """True where no case is left. The device is opened by children only: this process forks."""
    found = suites(chosen, only, small=small)
    left = 0
    for prefix, suite, work in found:
        todo = [(case, dtype) for case, dtype in work if prefix + case.title(dtype) not in session.done]
        left += len(todo) - judged(suite, todo, prefix, session, say)
    session.done[SUMMARY] = summary(session, total=sum(len(work) for _, _, work in found))
    session.save()
    say(f"{session.done[SUMMARY]['verdicts']}, {left} of {session.done[SUMMARY]['of']} left")
    return left == 0


def judged(suite: Suite, work: list[Work], prefix: str, session: Session, say: Callable[[str], None]) -> int:
    """How many of the cases were judged before the time was over; at least one of them is."""
    results = run_isolated(suite, work, limit=CASE_LIMIT)
    finished = 0
    try:
        for result in results:
            title = prefix + result.title
            session.record(title, result.to_json() | {"title": title})
            finished += 1
            if result.verdict.value == "FAIL":
                say(f"FAIL {title}: {result.reason}")
            if session.left < SPARE:
                break
    finally:
        results.close()  # ends the child that is under way
    return finished


def summary(session: Session, total: int) -> Facts:
    """Verdicts so far, and what fails."""
    results = [facts for name, facts in session.done.items() if name != SUMMARY]
    verdicts = Counter(facts["verdict"] for facts in results)
    failed = {facts["title"]: facts.get("reason", "") for facts in results if facts["verdict"] == "FAIL"}
    return {"verdicts": dict(verdicts), "ran": len(results), "of": total, "fails": failed}
