"""The engine in its own processes: nothing is orphaned and nobody waits for ever, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sglang_core import Engine
from sglang_core.errors import ConfigError, EngineDeadError

SETTINGS = {"model_path": "demo", "device": "cpu", "dtype": "float32", "max_total_tokens": 8192}


def wait_until(condition: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_processes_give_what_a_thread_gives_and_end_on_shutdown(engine: Engine) -> None:
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    with Engine(**SETTINGS) as other:
        children = psutil.Process().children(recursive=True)
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
def test_a_killed_parent_leaves_no_engine_behind(how: signal.Signals) -> None:
    script = (
        "from sglang_core import Engine; import sys, time\n"
        f"engine = Engine(**{SETTINGS!r})\n"
        "print(*engine.client._link.pids, flush=True)\n"
        "for _ in engine.generate('Hi', {'max_new_tokens': 2000, 'ignore_eos': True}, stream=True): pass\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids and all(psutil.pid_exists(pid) for pid in pids)
    parent.send_signal(how)
    parent.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


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
