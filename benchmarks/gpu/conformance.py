"""Part `conformance`: the suite on the device, a group of cases in a process of its own, those of the costly ops first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from sglang_conformance.isolation import run_isolated
from sglang_conformance.runner import Suite, Work

from benchmarks.gpu.session import Facts, Session
from sglang_core.backend.devices import ChosenDevice

FIRST = ("attn.", "moe.", "gemm.", "graph.", "sample.", "kv.", "norm.", "rope.", "runtime.")
SMALL = ("norm.rms[", "act.gated[")
SUMMARY = "summary"
CASE_LIMIT = 120.0  # seconds
SPARE = 15.0  # seconds that are left for writing and for a case that is under way


def select(suite: Suite, only: str, *, small: bool) -> list[Work]:
    """In the order in which they tell most."""
    work = suite.select([only] if only else SMALL if small else ())

    def rank(pair: Work) -> int:
        op = pair[0].op
        return next((i for i, prefix in enumerate(FIRST) if op.startswith(prefix)), len(FIRST))

    return sorted(work, key=rank)


def run(
    chosen: ChosenDevice, session: Session, only: str = "", *, small: bool, say: Callable[[str], None] = print
) -> bool:
    """True where no case is left. The device is opened by children only: this process forks."""
    suite = Suite(chosen.backend, chosen.info, full=False)
    work = select(suite, only, small=small)
    left = [(case, dtype) for case, dtype in work if case.title(dtype) not in session.done]
    results = run_isolated(suite, left, limit=CASE_LIMIT)
    finished = 0
    try:
        for result in results:
            session.record(result.title, result.to_json())
            finished += 1
            if result.verdict.value == "FAIL":
                say(f"FAIL {result.title}: {result.reason}")
            if session.left < SPARE:
                break
    finally:
        results.close()  # ends the child that is under way
    session.done[SUMMARY] = summary(session, total=len(work))
    session.save()
    say(f"{session.done[SUMMARY]['verdicts']}, {len(left) - finished} of {len(work)} left")
    return finished == len(left)


def summary(session: Session, total: int) -> Facts:
    """Verdicts so far, and what fails."""
    results = [facts for name, facts in session.done.items() if name != SUMMARY]
    verdicts = Counter(facts["verdict"] for facts in results)
    failed = {facts["title"]: facts.get("reason", "") for facts in results if facts["verdict"] == "FAIL"}
    return {"verdicts": dict(verdicts), "ran": len(results), "of": total, "fails": failed}
