"""The engine in its own processes: nothing is orphaned and nobody waits for ever, whoever dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from sglang_core import Engine
from sglang_core.config import EngineConfig
from sglang_core.engine.client import EngineClient
from sglang_core.errors import ConfigError, EngineDeadError

SETTINGS = {"model_path": "demo", "device": "cpu", "dtype": "float32", "max_total_tokens": 8192}


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(condition: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_processes_give_what_a_thread_gives_and_end_on_shutdown(engine: Engine) -> None:
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    with Engine(**SETTINGS) as other:
        children = [psutil.Process(pid) for pid in other.client._link.pids]  # type: ignore[attr-defined]
        directory = Path(other.client._link._ranks.directory)  # type: ignore[attr-defined]
        assert children and directory.stat().st_mode & 0o777 == 0o700
        assert other.generate("Hello", params)["output_ids"] == engine.generate("Hello", params)["output_ids"]
    wait_until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
    assert not directory.exists()
    other.shutdown()  # a second time is fine


def test_a_killed_engine_ends_the_running_request_with_an_error() -> None:
    with Engine(**SETTINGS) as engine:
        stream = engine.generate("Hello", {"max_new_tokens": 2000, "ignore_eos": True}, stream=True)
        next(stream)
        os.kill(engine.client._link.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            list(stream)
        with pytest.raises(EngineDeadError):
            engine.generate("Hello")
        assert not engine.client.is_alive


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_no_engine_behind(how: signal.Signals, tmp_path: Path) -> None:
    """Nor its sockets. A process that the parent forked holds every pipe of it, and lives on."""
    script = (
        "from sglang_core import Engine; import os, sys, time\n"
        f"engine = Engine(**{SETTINGS!r})\n"
        "if os.fork() == 0: time.sleep(20); os._exit(0)\n"
        "print(*engine.client._link.pids, flush=True)\n"
        "for _ in engine.generate('Hi', {'max_new_tokens': 2000, 'ignore_eos': True}, stream=True): pass\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids and all(psutil.pid_exists(pid) for pid in pids)
    parent.send_signal(how)
    parent.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    os.killpg(parent.pid, signal.SIGKILL)  # the forked one
    assert not list(tmp_path.iterdir())


def test_an_interpreter_that_ends_without_shutdown_ends_the_engine(tmp_path: Path) -> None:
    script = (
        "from sglang_core import Engine\n"
        f"engine = Engine(**{SETTINGS!r})\n"
        "print(*engine.client._link.pids, flush=True)\n"
        "next(engine.generate('Hi', {'max_new_tokens': 2000, 'ignore_eos': True}, stream=True))\n"
    )
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    wait_until(lambda: not any(is_running(int(pid)) for pid in done.stdout.split()))
    assert not list(tmp_path.iterdir())


def test_a_hung_engine_is_found_and_killed_and_an_idle_one_is_left_alone() -> None:
    with Engine(**SETTINGS, watchdog_timeout=2) as engine:
        time.sleep(3)
        assert engine.client.is_alive
        stream = engine.generate("Hello", {"max_new_tokens": 2000, "ignore_eos": True}, stream=True)
        next(stream)
        (pid,) = engine.client._link.pids  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="watchdog-timeout"):
            list(stream)
        assert not engine.client.is_alive
        wait_until(lambda: not is_running(pid))


async def test_a_start_that_is_given_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(psutil.Process().children())  # servers of other tests
    starting = asyncio.create_task(EngineClient.start(EngineConfig.from_flat(**SETTINGS)))
    while not (children := set(psutil.Process().children()) - before):
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(child.is_running() for child in children)
    assert not list(tmp_path.iterdir())


def test_engines_that_come_and_go_leave_no_thread_and_no_file_open() -> None:
    def cycle(*, shutdown: bool) -> int:
        other = Engine(**SETTINGS, in_process=True)
        other.generate("Hi", {"max_new_tokens": 2, "n": 3})
        if shutdown:
            other.shutdown()
        del other  # without a shutdown it ends by itself
        wait_until(lambda: set(threading.enumerate()) <= before)
        return psutil.Process().num_fds()

    before = set(threading.enumerate())
    first = cycle(shutdown=True)
    assert [cycle(shutdown=False), cycle(shutdown=True)] == [first, first]


def test_two_ranks_give_the_tokens_of_one(engine: Engine) -> None:
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    prompts = ["The capital of Spain is", "Hello, who are you?", "One two"]
    with Engine(**SETTINGS, tp_size=2) as two:
        got = [answer["output_ids"] for answer in two.generate(prompts, params)]
        pids = two.client._link.pids  # type: ignore[attr-defined]
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGKILL)
        wait_until(lambda: not two.client.is_alive)
    assert got == [answer["output_ids"] for answer in engine.generate(prompts, params)]
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_what_stops_the_engine_from_starting_is_said_by_the_parent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GrokForCausalLM"], "model_type": "grok"}')
    with pytest.raises(ConfigError, match="GrokForCausalLM"):
        Engine(model_path=str(tmp_path), device="cpu", skip_tokenizer_init=True)
