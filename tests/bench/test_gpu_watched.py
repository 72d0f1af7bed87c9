"""`benchmarks/gpu`: cases that crash, hang, or leave a device unusable. No device is needed: processes are killed on a host alike."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_conformance.result import Result, Verdict
from sglang_conformance.runner import Suite

from benchmarks.gpu import conformance, watched
from benchmarks.gpu.session import Case, Facts, Session

ABOUT = {"date": "today", "device": {"name": "Acme", "driver": "1.2"}, "small": True}
ROOT = Path(__file__).parents[2]


def crash() -> Facts:
    faulthandler.disable()  # pytest's, whose report would be taken for a failure
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hang() -> Facts:
    time.sleep(600)
    return {}


def fail() -> Facts:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def good() -> Facts:
    return {"pid": os.getpid()}


class Impatient(Case):
    """A tenth of a second is enough."""

    most = 0.5  # type: ignore[assignment]


def session(path: Path, limit: float = 100) -> Session:
    return Session(path / "x.json", dict(ABOUT), limit)


def listed(*runs: Callable[[], Facts]) -> Callable[[], list[Case]]:
    names = (f"{i} {run.__name__}" for i, run in enumerate(runs))
    cases = [Impatient(name, run, seconds=0.1) for name, run in zip(names, runs, strict=True)]
    return lambda: cases


def quiet(text: str) -> None:
    return


@pytest.mark.parametrize(
    ("bad", "why"), [(crash, "SIGSEGV"), (hang, "did not end within"), (fail, "an illegal memory access")]
)
def test_a_bad_case_costs_itself_alone_and_the_rest_go_on_in_a_new_process(
    bad: Callable[[], Facts], why: str, tmp_path: Path
) -> None:
    found = session(tmp_path)
    assert watched.run(found, listed(good, good, bad, good), say=quiet)
    assert list(found.failed) == [f"2 {bad.__name__}"]
    assert why in found.failed[f"2 {bad.__name__}"]
    first, second, last = (facts["pid"] for facts in found.done.values())
    assert first == second != last
    assert json.loads((tmp_path / "x.json").read_text())["failed"] == found.failed


def test_a_case_may_be_the_last_of_its_process(tmp_path: Path) -> None:
    found = session(tmp_path)
    cases = [Case("a", good, last=True), Case("b", good), Case("c", good)]
    assert watched.run(found, lambda: cases, say=quiet)
    first, second, third = (facts["pid"] for facts in found.done.values())
    assert first != second == third


def test_what_failed_is_tried_last_in_the_next_run_and_once(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    def noted() -> Facts:
        with ran.open("a") as file:
            file.write("noted ")
        return fail()

    def late() -> Facts:
        with ran.open("a") as file:
            file.write("late ")
        return good()

    watched.run(session(tmp_path), listed(noted), say=quiet)
    found = session(tmp_path)
    assert watched.run(found, listed(noted, late, late), say=quiet)
    assert ran.read_text().split() == ["noted", "late", "late", "noted"]
    assert list(found.failed) == ["0 noted"]


def test_where_what_the_others_need_fails_none_of_them_is_begun(tmp_path: Path) -> None:
    cases = [Case("late", good), Case("limits", crash, first=True)]
    found = session(tmp_path)
    assert watched.run(found, lambda: cases, say=quiet)
    assert found.done == {}
    assert list(found.failed) == ["limits"]


def test_figures_that_are_known_outlive_what_is_tried_beside_them(tmp_path: Path) -> None:
    found = session(tmp_path)

    def case() -> Facts:
        found.begin("a", {"us": 1.5}, trying="hopper")
        return crash()

    assert watched.run(found, lambda: [Case("a", case), Case("b", good)], say=quiet)
    assert found.done["a"] == {"us": 1.5, "hopper_error": "killed its process by SIGSEGV"}
    assert set(found.done) == {"a", "b"}
    assert found.failed == {}


def test_no_time_is_left_and_none_is_overrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = session(tmp_path, limit=5)
    assert not watched.run(found, lambda: [Case("a", good, seconds=1), Case("b", good, seconds=60)], say=quiet)
    assert set(found.done) == {"a"}
    monkeypatch.setattr(watched, "GRACE", 0.0)
    found = session(tmp_path, limit=1)
    started = time.monotonic()
    watched.run(found, lambda: [Case("c", hang, seconds=0.1)], say=quiet)
    assert time.monotonic() - started < Case("c", hang, seconds=0.1).most
    assert "did not end within" in found.failed["c"]


def test_what_a_case_started_is_killed_with_it(tmp_path: Path) -> None:
    def starts() -> Facts:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (tmp_path / "pid").write_text(str(child.pid))
        return hang()

    watched.run(session(tmp_path), listed(starts), say=quiet)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} lives")


def test_a_run_that_was_killed_whole_is_known_by_its_file(tmp_path: Path) -> None:
    """As a command at its limit is: the case that it was in is not begun first again."""
    found = session(tmp_path)
    found.record("a", {"us": 1.5})
    found.begin("b")
    again = session(tmp_path)
    assert again.failed == {"b": "the run was ended while this was under way"}
    assert [case.name for case in again.todo([Case(name, good) for name in "abc"])] == ["c", "b"]


def test_its_cases_end_with_it(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from benchmarks.gpu import watched;"
        " from benchmarks.gpu.session import Case, Session;"
        " folder = Path(sys.argv[1]);"
        " case = lambda: ((folder / 'pid').write_text(str(os.getpid())), time.sleep(600));"
        " watched.run(Session(folder / 'x.json', {'device': {}}, 100), lambda: [Case('a', case)])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    pid = tmp_path / "pid"
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid.read_text()}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the case outlived its run")


def test_a_process_that_begins_nothing_is_an_error(tmp_path: Path) -> None:
    def cases() -> list[Case]:
        raise OSError("no such device")

    with pytest.raises(RuntimeError, match="has begun none: ended its process with status 5"):
        watched.run(session(tmp_path), cases, say=quiet)


def test_a_patch_of_the_driver_does_not_begin_a_file_anew(tmp_path: Path) -> None:
    found = session(tmp_path)
    found.record("a", {"us": 1.5})
    other = Session(tmp_path / "x.json", ABOUT | {"device": {"name": "Acme", "driver": "1.3"}}, 100)
    assert set(other.done) == {"a"}


def test_cases_that_are_processes_run_beside_each_other(tmp_path: Path) -> None:
    found = session(tmp_path)
    cases = [Case("a", good), Case("b", fail), Case("c", good), Case("d", good, seconds=1000)]
    assert not found.run(cases, quiet, jobs=3)
    assert set(found.done) == {"a", "c"}
    assert set(found.failed) == {"b"}


@dataclass(frozen=True)
class Named:
    op: str
    name: str

    def title(self, dtype: torch.dtype) -> str:
        return f"{self.op}[{self.name}]"


def test_a_failed_case_of_the_suite_does_not_fail_those_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged as a device does that an illegal address has made useless to its process."""
    broken = []

    def result(suite: Suite, case: Named, dtype: torch.dtype, verdict: Verdict, reason: str = "") -> Result:
        return Result(
            op=case.op, title=case.title(dtype), dtype="float32", profile="core", verdict=verdict, reason=reason
        )

    def judge(suite: Suite, case: Named, dtype: torch.dtype) -> Result:
        broken.extend([case] if case.name == "bad" else [])
        return result(suite, case, dtype, Verdict.FAIL if broken else Verdict.PASS)

    def failed(suite: Suite, case: Named, dtype: torch.dtype, reason: str) -> Result:
        return result(suite, case, dtype, Verdict.FAIL, reason)

    for name, fake in {"judge": judge, "failed": failed, "__init__": lambda self: None}.items():
        monkeypatch.setattr(Suite, name, fake)
    work: Any = [(Named("attn.paged", name), torch.float32) for name in ("one", "bad", "two", "three")]
    found = session(tmp_path)
    while todo := [pair for pair in work if pair[0].title(pair[1]) not in found.done]:
        conformance.judge(conformance.DeviceSuite(), todo, "", found, quiet, jobs=2)  # type: ignore[call-arg]
    assert {name: facts["verdict"] for name, facts in found.done.items() if facts["verdict"] == "FAIL"} == {
        "attn.paged[bad]": "FAIL"
    }
    assert len(found.done) == 4


def test_the_end_of_the_time_is_kept_wherever_it_comes() -> None:
    started = time.monotonic()
    with pytest.raises(conformance.TimeOverError), conformance.time_limit(0.2):
        select.select([], [], [], 60)
    assert time.monotonic() - started < 30
