"""Starting the rank processes and watching them. Their stdin pipes are their lifelines; their sockets live in a 0700 directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sglang_core.backend.placement import num_processes
from sglang_core.config import EngineConfig
from sglang_core.engine.worker import Launch


class Ranks:
    """The engine processes of one replica. `directory` holds their sockets and goes with them."""

    def __init__(self, config: EngineConfig, *, replica: int = 0, progress: bool) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sglang-core-"))  # mkdtemp makes it 0700
        self._config, self._replica, self._progress = config, replica, progress
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        sizes = self._config.parallel
        world_size = num_processes(self._config.device.device, tp_size=sizes.tp_size, dp_size=sizes.dp_size)
        environment = self._environment(world_size)
        for rank in range(world_size):
            launch = Launch(
                settings=self._config.flat(),
                replica=self._replica,
                rank=rank,
                world_size=world_size,
                directory=str(self.directory),
                log_level=self._config.server.log_level,
                progress=self._progress,
            )
            with _deaf_to_ctrl_c():
                process = subprocess.Popen(
                    [sys.executable, "-m", "sglang_core.engine.worker"], stdin=subprocess.PIPE, env=environment
                )
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(launch) + b"\n")
            process.stdin.flush()
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def dead(self) -> str | None:
        """What happened to a rank that has ended, None while all run."""
        for rank, process in enumerate(self._processes):
            if (code := process.poll()) is not None:
                cause = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
                return f"engine rank {rank} (pid {process.pid}) {cause}"
        return None

    def kill(self) -> None:
        """End every rank at once, and wait for none."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def stop(self, *, grace: float) -> None:
        """End every rank. Rank 0, if asked to shut down, gets `grace` seconds; the others only wait for plans. Safe twice."""
        for process in self._processes[:1]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        self.kill()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def _environment(self, world_size: int) -> dict[str, str]:
        """The parent's, with OpenMP kept to the cores a process may use, as it would else take all of them in every one."""
        env, processes = dict(os.environ), world_size * self._config.parallel.dp_size
        if processes > 1 and "OMP_NUM_THREADS" not in env:
            cores = len(os.sched_getaffinity(0))
            env["OMP_NUM_THREADS"] = str(max(1, cores // processes))
        return env


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """A terminal's Ctrl-C goes to the whole group, and the parent decides: a process started here has SIGINT blocked for life."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal_name(number: int) -> str:
    names = {
        known.value: known.name for known in signal.Signals
    }  # of real-time signals only the first and last are known
    return names.get(number, f"signal {number}")
