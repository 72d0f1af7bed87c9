"""Ranks in processes of their own, or those of a mesh in one. A helper process imports torch once and forks them, and never opens a device itself.

    python -m sglang_conformance.rank_host     reads a job a line on stdin and answers each with a line on stdout

The helper ends with the process that started it, and its ranks with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_conformance.mesh_ranks import run_over_mesh
from sglang_conformance.rank import DIED, Program, Rank
from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.interface import Backend, DeviceInfo, RuntimeContext
from sglang_core.backend.placement import Placement, place

COLLECTIVE_LIMIT = 30.0  # seconds
GRACE = 30.0  # beyond that: opening a device, closing it
POLL = 0.01


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program and the group that runs it. `backend` and `program` are "module:name"; `seconds` ends ranks that hang."""

    backend: str
    program: str
    size: int
    dtype: str
    seed: int
    args: Mapping[str, Any]
    num_threads: int | None
    timeout: float  # seconds that a collective may take before it raises
    seconds: float
    folder: str
    device: str  # the label of the first rank's
    mesh: bool  # whether one process drives all ranks


class RankHost:
    """Runs programs over ranks of one backend. The helper process is started by the first of them."""

    def __init__(self, backend: Backend, num_threads: int | None, info: DeviceInfo | None = None) -> None:
        """The ranks make a backend of their own, of this one's class. `info`: the first rank's device; the best one by default."""
        self._device = ChosenDevice(backend=backend, info=info or backend.probe()[0], reason="the suite's")
        self._backend, self._num_threads = f"{type(backend).__module__}:{type(backend).__qualname__}", num_threads
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        program: Program,
        args: Mapping[str, Any],
        *,
        size: int,
        dtype: torch.dtype,
        seed: int,
        dead: tuple[int, ...] = (),
        timeout: float = COLLECTIVE_LIMIT,
    ) -> dict[int, Mapping[str, Tensor]]:
        """What each rank's program returns, by rank; those in `dead` are to end with status DIED, and return nothing.

        Raises AssertionError where a rank ends otherwise, or leaves a process behind, ValueError where one of a mesh is to die, DeviceError
        where there are fewer devices than ranks.
        """
        mesh = len(self.place(size).devices) > 1
        if mesh and dead:
            raise ValueError("one process drives all ranks: none of them dies alone")
        with tempfile.TemporaryDirectory() as folder:
            job = Job(
                backend=self._backend,
                program=f"{program.__module__}:{program.__qualname__}",
                size=size,
                dtype=str(dtype).removeprefix("torch."),
                seed=seed,
                args=args,
                num_threads=self._num_threads,
                timeout=timeout,
                seconds=timeout + GRACE,
                folder=folder,
                device=self._device.info.label,
                mesh=mesh,
            )
            answer = self._ask(job)
            for rank, (status, said) in enumerate(zip(answer["statuses"], answer["said"], strict=True)):
                assert status == (DIED if rank in dead else 0), f"rank {rank} {_how(status, job)}{said}"
            assert not answer["orphans"], f"its ranks ended and left {answer['orphans']} processes behind"
            return {rank: load_file(f"{folder}/{rank}.safetensors") for rank in range(size) if rank not in dead}

    def place(self, size: int) -> Placement:
        """The first process's devices. Raises DeviceError where there are too few."""
        return place(self._device, tp_size=size)

    def process(self) -> subprocess.Popen[str]:
        """The helper, started by who asks first."""
        if self._process is None:
            env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._process

    def _ask(self, job: Job) -> dict[str, Any]:
        helper = self.process()
        assert helper.stdin is not None and helper.stdout is not None
        helper.stdin.write(json.dumps(asdict(job)) + "\n")
        helper.stdin.flush()
        line = helper.stdout.readline()
        assert line, f"the process that starts ranks ended with status {helper.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()  # closes its input, which ends it
            self._process = None


def _how(status: int, job: Job) -> str:
    if status == -signal.SIGKILL:
        return f"did not end within {job.seconds:g} s and was killed (or died of SIGKILL)"
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}: "


# In the helper from here on.


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what plugins print is not an answer
    for line in sys.stdin:
        os.write(answers, (json.dumps(_answer(Job(**json.loads(line)))) + "\n").encode())


def _answer(job: Job) -> dict[str, Any]:
    pids = [_fork(job, rank) for rank in range(1 if job.mesh else job.size)]
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + job.seconds
    try:
        while len(statuses) < len(pids) and time.monotonic() < deadline and not _abandoned():
            for rank, pid in enumerate(pids):
                if rank not in statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    statuses[rank] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(POLL)
    finally:
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                os.kill(pid, signal.SIGKILL)
                statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        orphans = _end_sessions(set(pids))
    said = [(Path(job.folder) / f"{rank}.txt") for rank in range(len(pids))]
    return {
        "statuses": [statuses[rank] for rank in range(len(pids))],
        "said": [file.read_text() if file.exists() else "" for file in said],
        "orphans": orphans,
    }


def _abandoned() -> bool:
    """Stdin is only readable between jobs where the other end is gone."""
    return bool(select.select([0], [], [], 0)[0])


def _end_sessions(sessions: set[int]) -> int:
    """End what ranks started and did not end. Each rank leads a session of its own."""
    left = 0
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) in sessions:
                os.kill(pid, signal.SIGKILL)
                left += 1
    return left


def _fork(job: Job, rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        _run_mesh(job) if job.mesh else _run(job, rank)
        status = 0
    except BaseException as e:
        traceback.print_exc()
        (Path(job.folder) / f"{rank}.txt").write_text(f"{type(e).__name__}: {e}")
    finally:
        os._exit(status)


def _run(job: Job, rank: int) -> None:
    """A rank's whole life."""
    device = _device(job)
    placed = place(device, tp_size=job.size, rank=rank)
    runtime = device.backend.create_runtime(
        RuntimeContext(
            devices=placed.devices,
            share=placed.share,
            num_shares=placed.num_shares,
            rank=rank,
            world_size=job.size,
            num_threads=job.num_threads,
            dist_timeout=job.timeout,
        )
    )
    store = dist.FileStore(f"{job.folder}/store", job.size)  # type: ignore[attr-defined]
    me = Rank(
        comm=runtime.communicator(range(job.size), rank, store),
        dtype=getattr(torch, job.dtype),
        seed=job.seed,
        timeout=job.timeout,
        runtime=runtime,
        place=lambda x: x.to(runtime.torch_device),
        another=lambda: runtime.communicator(range(job.size), rank, store),
    )
    with torch.inference_mode():
        outputs = {name: x.cpu().contiguous() for name, x in _named(job.program)(me, **job.args).items()}
    save_file(outputs, f"{job.folder}/{rank}.safetensors")
    runtime.close()


def _run_mesh(job: Job) -> None:
    """All ranks' life."""
    device = _device(job)
    devices = place(device, tp_size=job.size).devices
    runtime = device.backend.create_runtime(RuntimeContext(devices=devices, num_threads=job.num_threads))
    with torch.inference_mode():
        found = run_over_mesh(
            _named(job.program),
            job.args,
            runtime=runtime,
            size=job.size,
            dtype=getattr(torch, job.dtype),
            seed=job.seed,
        )
    for rank, outputs in found.items():
        save_file(outputs, f"{job.folder}/{rank}.safetensors")
    runtime.close()


def _device(job: Job) -> ChosenDevice:
    backend: Backend = _named(job.backend)()
    info = next(info for info in backend.probe() if info.label == job.device)
    return ChosenDevice(backend=backend, info=info, reason="the suite's")


def _named(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    main()
