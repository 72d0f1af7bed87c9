"""What compute threads do when CPUs are taken away and come back, while kernels run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sglang_xeon.team import Team

ALLOWED = sorted(os.sched_getaffinity(0))


def test_cpus_that_are_taken_away_are_given_up_and_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    allowed = {0, 1, 2, 3}
    used: list[list[int]] = []
    team = Team([0, 1, 2], 3, lambda: set(allowed))
    team._use = lambda cpus: used.append(list(cpus))  # type: ignore[method-assign]
    team.start()
    for now_allowed in ({0, 1, 3}, {0, 1, 3}, {3}, {0, 1, 2, 3}):
        allowed = now_allowed
        team._next_look = 0.0
        team.follow()
    assert used == [[0, 1, 2], [0, 1], [3], [0, 1, 2]]
    assert "may now use CPUs 0-1,3: computing on 0-1" in caplog.text


def test_the_mask_is_looked_at_once_a_second() -> None:
    looks = [0]

    def allowed() -> set[int]:
        looks[0] += 1
        return {0}

    team = Team([0], 1, allowed)
    for _ in range(100):
        team.follow()
    assert looks[0] == 2  # when it was made, and the first time


RUN = """
import sys, time, torch
from sglang_core.api import RuntimeContext
from sglang_core.api.ops import PackedWeight
from sglang_xeon import gemm
from sglang_xeon.backend import XeonBackend

torch.manual_seed(0)
runtime = XeonBackend().create_runtime(RuntimeContext(devices=tuple(XeonBackend().probe())))
weight = torch.randn(256, 128)
packed = gemm.pack(PackedWeight("dense", {"weight": weight}, out_features=256, in_features=128))
step = runtime.compile_step(lambda state, x: gemm.linear(x, packed), None, ())
stream, x = runtime.stream(), torch.randn(64, 128)
first = stream.submit(step, x).result()
print("ready", flush=True)
for line in sys.stdin:
    runtime.team._next_look = 0.0
    for _ in range(50):
        assert torch.equal(stream.submit(step, x).result(), first)
    print(stream.submit(torch.get_num_threads).result(), flush=True)
"""


@pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two CPUs, to take one away")
def test_a_running_process_loses_a_cpu_and_goes_on_with_the_same_results() -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None

    def ask() -> str:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    def allow(cpus: list[int]) -> None:
        for task in Path(f"/proc/{process.pid}/task").iterdir():  # all threads, as `taskset -ap` does
            os.sched_setaffinity(int(task.name), cpus)

    try:
        assert process.stdout.readline() == "ready\n"
        before = int(ask())
        allow(ALLOWED[:1])
        assert ask() == "1"
        assert all(
            os.sched_getaffinity(int(task.name)) == {ALLOWED[0]} for task in Path(f"/proc/{process.pid}/task").iterdir()
        )
        allow(ALLOWED)
        assert int(ask()) == before
    finally:
        process.kill()
        process.communicate()


def test_more_threads_than_cpus_float() -> None:
    before = torch.get_num_threads()
    try:
        team = Team(ALLOWED[:1], 3)
        team.start()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
