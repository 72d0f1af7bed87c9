"""A real server on the demo model, for tests that talk HTTP."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import psutil
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
# In CI the drawn examples are always the same, so that a change is judged by what it changes; elsewhere they are new each time.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")
# Tiny tensors: a second thread costs more than it gives, most of all on a shared machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass
class LiveServer:
    """A running `sglang-core serve`; `url` has no path."""

    url: str
    banner: list[str]
    process: subprocess.Popen[str]

    @property
    def engine(self) -> psutil.Process:
        """Its first engine process."""
        return psutil.Process(self.process.pid).children()[0]


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[LiveServer]:
    """Start a server on a free port and end it, politely."""
    command = [sys.executable, "-m", "sglang_core", "serve", "--model-path", "demo", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    banner: list[str] = []
    for line in process.stdout:
        banner.append(line.rstrip())
        if line.startswith("curl "):
            break
    else:
        raise AssertionError(f"the server ended with {process.wait()}: {banner}")
    url = next(line.split()[2] for line in banner if line.startswith("ready at "))
    try:
        yield LiveServer(url=url, banner=banner, process=process)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def live_server() -> Iterator[LiveServer]:
    """The demo model in float32 on the reference backend, shared by all tests that leave it as it was."""
    with serving("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "16384") as server:
        yield server
