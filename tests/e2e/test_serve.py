"""What a newcomer sees: a real server, a real client, real answers; and what is left when something dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import httpx
import openai
import psutil
import pytest

from tests.conftest import LiveServer, serving

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def client(live_server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live_server.url}/v1", api_key="none", max_retries=0)


def test_the_curl_of_the_banner_answers_paris(live_server: LiveServer) -> None:
    assert live_server.banner[-1].startswith("curl ")
    out = subprocess.run(live_server.banner[-1], shell=True, capture_output=True, text=True, check=True).stdout
    assert "Paris" in json.loads(out)["choices"][0]["message"]["content"]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens > 2


def test_three_countries_and_their_capitals(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "List 3 countries and their capitals."}]
    text = client.chat.completions.create(model="demo", messages=messages, temperature=0).choices[0].message.content
    assert (text is not None and len(set(text.replace("-", "\n").split("\n"))) >= 2) or text.count(":") >= 2


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 2
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.total_tokens == whole.usage.total_tokens  # type: ignore[union-attr]


def test_logprobs_n_stop_and_seed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=1.5, n=3, seed=5, logprobs=True, top_logprobs=2, max_tokens=6
    )
    again = client.chat.completions.create(model="demo", messages=QUESTION, temperature=1.5, n=3, seed=5, max_tokens=6)
    assert [c.message.content for c in answer.choices] == [c.message.content for c in again.choices]
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)
    cut = client.completions.create(model="demo", prompt="The capital of France is", temperature=0, stop=["Par"])
    assert "Par" not in cut.choices[0].text and cut.choices[0].finish_reason == "stop"


def test_completions_take_text_ids_and_lists_and_echo(client: openai.OpenAI) -> None:
    one = client.completions.create(model="demo", prompt="The capital of Italy is", temperature=0, max_tokens=4)
    two = client.completions.create(model="demo", prompt=["The capital of Italy is"] * 2, temperature=0, max_tokens=4)
    assert [choice.text for choice in two.choices] == [one.choices[0].text] * 2
    echoed = client.completions.create(
        model="demo", prompt="The capital of Italy is", temperature=0, max_tokens=4, echo=True, logprobs=1
    )
    assert echoed.choices[0].text == "The capital of Italy is" + one.choices[0].text
    logprobs = echoed.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None and all(p is not None for p in logprobs.token_logprobs[1:])
    ids = httpx.post(
        f"{str(client.base_url).removesuffix('/v1/')}/tokenize", json={"prompt": "The capital of Italy is"}
    ).json()["tokens"]
    by_ids = client.completions.create(model="demo", prompt=ids, temperature=0, max_tokens=4)
    assert by_ids.choices[0].text == one.choices[0].text


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=QUESTION, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="demo"):
        client.chat.completions.create(model="nonesuch", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=[5] * 3000)
    assert caught.value.code == "context_length_exceeded" and "2048" in str(caught.value)


def test_a_client_that_leaves_frees_its_request(live_server: LiveServer) -> None:
    body = {"text": "Hi", "sampling_params": {"max_new_tokens": 1900, "ignore_eos": True}, "stream": True}
    with httpx.stream("POST", f"{live_server.url}/generate", json=body, timeout=30) as response:
        next(response.iter_lines())
    wait_until(lambda: "sglang_num_running_reqs" in metrics(live_server) and running(live_server) == 0)
    assert running(live_server) == 0


def metrics(server: LiveServer) -> str:
    return httpx.get(f"{server.url}/metrics").text


def running(server: LiveServer) -> float:
    line = next(x for x in metrics(server).splitlines() if x.startswith("sglang_num_running_reqs"))
    return float(line.rsplit(" ", 1)[1])


def test_a_killed_engine_ends_streams_with_an_error_and_readiness_with_503() -> None:
    with serving("--device", "cpu", "--max-total-tokens", "8192") as server:
        body = {"text": "Hi", "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}, "stream": True}
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.engine.kill()
            rest = [line for line in lines if line.startswith("data: ")]
        assert any("error" in line and "SIGKILL" in line for line in rest)
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert httpx.post(f"{server.url}/generate", json={"text": "Hi"}).status_code == 503


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_server_leaves_no_process(how: signal.Signals) -> None:
    with serving("--device", "cpu", "--max-total-tokens", "8192") as server:
        family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        assert len(family) >= 2
        server.process.send_signal(how)
        wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))


def test_the_toy_vendor_serves_the_demo_model() -> None:
    with serving("--device", "acme", "--max-total-tokens", "8192") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
        assert "Paris" in (answer.choices[0].message.content or "")
        assert "acme" in " ".join(server.banner)


def test_ctrl_c_while_the_model_loads_ends_everything_without_a_word() -> None:
    """A terminal sends it to the whole process group."""
    command = [sys.executable, "-m", "sglang_core", "serve", "--model-path", "demo", "--device", "cpu", "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_until(lambda: bool(psutil.Process(process.pid).children()))
    family = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "")
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))


def test_headers_without_end_are_refused(live_server: LiveServer) -> None:
    host, port = live_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: ")
        with contextlib.suppress(ConnectionError):  # it hangs up in the middle
            for _ in range(64):
                connection.sendall(b"a" * 65536)
        with contextlib.suppress(ConnectionError):
            assert b"400" in connection.recv(100)
    assert httpx.get(f"{live_server.url}/livez").status_code == 200
    cookie = {"Cookie": "a" * 32_000}
    assert httpx.get(f"{live_server.url}/livez", headers=cookie).status_code == 200


def test_a_server_on_the_device_that_checks_every_step(client: openai.OpenAI) -> None:
    """Its answer is the reference backend's, and no step broke a rule."""
    asked = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    settings = (
        "--dtype",
        "float32",
        "--max-total-tokens",
        "512",
        "--context-length",
        "256",
        "--max-running-requests",
        "2",
    )
    with serving("--device", "strict", *settings) as server:
        strict = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answers = [c.chat.completions.create(**asked).choices[0].message.content for c in (client, strict)]
    assert answers[0] == answers[1]
