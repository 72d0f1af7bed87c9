"""The life of a server process: ports, signals, draining. The engine is the fake, the process and its signals are real."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from sglang_core.config import ServerArgs
from sglang_core.errors import ConfigError
from sglang_core.server.banner import banner
from sglang_core.server.listen import base_url, listen
from tests.server.fake_client import INFO
from tests.server.live import PATIENCE, wait_for
from tests.server.test_validation import CHAT, VALID

SCRIPT = """
import asyncio, json, sys
from sglang_core.config import EngineConfig
from sglang_core.server import run
from tests.server.fake_client import FakeClient

options = json.loads(sys.argv[1])

async def start_client(config):
    await asyncio.sleep(options["loading"])
    if options["fails"]:
        raise RuntimeError("no such model")
    return FakeClient(delay=options["delay"])

run.start_client = start_client
sys.exit(run.serve(EngineConfig.from_flat(**options["settings"]), on_ready=lambda url: print("READY", url, flush=True)))
"""


class Process:
    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.url = process, f"http://127.0.0.1:{port}"

    def status(self, path: str) -> int:
        try:
            return httpx.get(self.url + path).status_code
        except httpx.TransportError:
            return 0

    def wait_ready(self) -> None:
        wait_for(lambda: self.status("/readyz") == 200)

    def ask_in_background(self, **fields: Any) -> list[httpx.Response | httpx.TransportError]:
        """Starts a request; its response is in the list once it has ended."""
        ended: list[httpx.Response | httpx.TransportError] = []

        def ask() -> None:
            try:
                ended.append(httpx.post(self.url + CHAT, json={**VALID[CHAT], **fields}, timeout=PATIENCE))
            except httpx.TransportError as exc:
                ended.append(exc)

        threading.Thread(target=ask, daemon=True).start()
        wait_for(lambda: httpx.get(self.url + "/server_info").json()["stats"]["requests"] == 1)
        return ended

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(*, loading: float = 0.0, delay: float = 0.0, fails: bool = False, **settings: Any) -> Iterator[Process]:
    port = free_port()
    options = {"loading": loading, "delay": delay, "fails": fails, "settings": {"port": port, **settings}}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(options)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield Process(process, port)
    finally:
        process.kill()
        process.wait()


def test_a_server_is_alive_while_it_loads_and_ready_after() -> None:
    with running(loading=1.5) as server:
        wait_for(lambda: server.status("/livez") == 200)
        assert server.status("/readyz") == 503
        response = httpx.post(server.url + CHAT, json=VALID[CHAT])
        assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
        server.wait_ready()
        assert httpx.post(server.url + CHAT, json=VALID[CHAT]).status_code == 200
        server.signal(signal.SIGTERM)
        code, out = server.end()
    assert code == 0
    lines = out.strip().splitlines()
    assert lines[-1] == f"READY {server.url}"
    command = shlex.split(lines[-2])
    assert command[:2] == ["curl", server.url + CHAT]
    assert json.loads(command[command.index("-d") + 1])["model"] == INFO.served_model_name


def test_a_signal_while_loading_ends_the_server() -> None:
    with running(loading=60) as server:
        wait_for(lambda: server.status("/livez") == 200)
        server.signal(signal.SIGINT)
        assert server.end()[0] == 0


def test_an_engine_that_does_not_start_ends_the_server() -> None:
    with running(fails=True) as server:
        code, out = server.end()
    assert code == 1
    assert "no such model" in out


def test_sigterm_lets_running_requests_finish() -> None:
    with running(delay=0.1) as server:
        server.wait_ready()
        ended = server.ask_in_background(max_tokens=30, ignore_eos=True)
        server.signal(signal.SIGTERM)
        wait_for(lambda: server.status("/readyz") == 503)
        assert server.status("/livez") == 200
        refused = httpx.post(server.url + CHAT, json=VALID[CHAT])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert server.end()[0] == 0
    (response,) = ended
    assert isinstance(response, httpx.Response)
    assert response.json()["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_outlive_the_drain_are_aborted(stream: bool) -> None:
    with running(delay=0.05, drain_timeout=0) as server:
        server.wait_ready()
        ended = server.ask_in_background(max_tokens=450, ignore_eos=True, stream=stream)
        server.signal(signal.SIGTERM)
        assert server.end()[0] == 0
    (response,) = ended
    assert isinstance(response, httpx.Response)
    assert '"finish_reason":"abort"' in response.text


def test_a_second_signal_does_not_wait() -> None:
    with running(delay=0.05, drain_timeout=600) as server:
        server.wait_ready()
        ended = server.ask_in_background(max_tokens=450, ignore_eos=True)
        server.signal(signal.SIGINT)
        wait_for(lambda: server.status("/readyz") == 503)
        assert not ended
        server.signal(signal.SIGINT)
        assert server.end()[0] == 128 + signal.SIGINT


def test_a_port_in_use_says_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: the port is in use.*--port"):
            listen(ServerArgs(port=port))


def test_two_servers_cannot_share_a_port() -> None:
    with listen(ServerArgs(port=0)) as first, pytest.raises(ConfigError, match="in use"):
        listen(ServerArgs(port=first.getsockname()[1]))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a" * 70])
def test_a_host_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        listen(ServerArgs(host=host, port=0))


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1"), ("0.0.0.0", "http://127.0.0.1"), ("::1", "http://[::1]")]
)
def test_the_url_to_call(host: str, url: str) -> None:
    with listen(ServerArgs(host=host, port=0)) as sock:
        assert re.fullmatch(re.escape(url) + r":\d+", base_url(ServerArgs(host=host), sock))


def test_the_banner_never_shows_a_key() -> None:
    text = banner(INFO, ServerArgs(api_key="hush"), "http://x", {"fallbacks": 2.0}, has_chat=True)
    assert "hush" not in text
    assert '"Authorization: Bearer $API_KEY"' in text.splitlines()[-1]
    assert "2 ops fell back" in text
    assert "/generate" in banner(INFO, ServerArgs(), "http://x", {}, has_chat=False).splitlines()[-1]
