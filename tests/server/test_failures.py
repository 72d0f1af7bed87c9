"""Full queues, dead engines, clients that hang up: everybody gets an end, and nothing runs on for nobody."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest

from sglang_core.types import FinishReason
from tests.server.conftest import connect
from tests.server.fake_client import FakeClient
from tests.server.live import Live, serving, wait_for
from tests.server.test_validation import CHAT, NATIVE, TEXT, VALID, error_of

STREAMED: Any = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
EVERY_PATH: Any = pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])


@EVERY_PATH
@STREAMED
async def test_a_full_queue_is_a_429(path: str, stream: bool) -> None:
    async with connect(FakeClient(queue_full=True)) as http:
        response = await http.post(path, json={**VALID[path], "stream": stream})
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert response.headers["retry-after"] == "3"


@EVERY_PATH
@STREAMED
async def test_a_dead_engine_is_a_503(path: str, stream: bool) -> None:
    async with connect(FakeClient(alive=False)) as http:
        response = await http.post(path, json={**VALID[path], "stream": stream})
    assert error_of(response, 503)["code"] == "engine_dead"
    assert "retry-after" in response.headers


@EVERY_PATH
@STREAMED
async def test_the_engines_own_refusal_has_its_status(path: str, stream: bool) -> None:
    refuse = FinishReason("abort", message="out of pages", status=413)
    async with connect(FakeClient(refuse=refuse)) as http:
        error = error_of(await http.post(path, json={**VALID[path], "stream": stream}), 413)
    assert error["message"] == "out of pages"


@EVERY_PATH
async def test_an_engine_that_dies_mid_stream_ends_it_with_an_error_event(path: str) -> None:
    async with connect(FakeClient(fail_after=2)) as http:
        response = await http.post(path, json={**VALID[path], "stream": True})
    assert response.status_code == 200
    *_, error, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"


@EVERY_PATH
async def test_an_engine_that_dies_mid_answer_is_a_503(path: str) -> None:
    async with connect(FakeClient(fail_after=2)) as http:
        error_of(await http.post(path, json=VALID[path]), 503)


@EVERY_PATH
@STREAMED
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_a_client_that_hangs_up_aborts_its_requests(path: str, stream: bool, batch: bool) -> None:
    body = {**VALID[path], "stream": stream}
    if batch and path != CHAT:
        body["prompt" if path == TEXT else "text"] = ["a", "b", "c"]
    expected = 3 if batch and path != CHAT else 1
    with serving(FakeClient(delay=60)) as live:
        with hang_up_socket(live, path, body):
            wait_for(lambda: len(live.client.requests) == expected)
            assert live.client.given_up == []
        wait_for(lambda: len(live.client.given_up) == expected)
        wait_for(lambda: live.serving.num_running == 0)
        assert sorted(live.client.given_up) == sorted(request.rid or "" for request in live.client.requests)


def test_a_client_that_hangs_up_between_events_aborts_its_request() -> None:
    client = FakeClient(delay=0.05)
    with serving(client) as live:
        body = {**VALID[CHAT], "stream": True, "max_tokens": 400, "ignore_eos": True}
        with hang_up_socket(live, CHAT, body) as sock:
            received = b""
            while received.count(b"data: ") < 4:
                received += sock.recv(4096)
        wait_for(lambda: client.given_up == [client.requests[0].rid])


def hang_up_socket(live: Live, path: str, body: Any) -> socket.socket:
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", live.port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


async def test_a_rid_that_runs_already_is_a_400() -> None:
    client = FakeClient(delay=0.05)
    async with connect(client) as http:
        first = asyncio.create_task(http.post(CHAT, json={**VALID[CHAT], "rid": "a", "n": 2}))
        while not client.requests:
            await asyncio.sleep(0)
        for rid in ("a", "a-0", "a-1"):
            error = error_of(await http.post(CHAT, json={**VALID[CHAT], "rid": rid}))
            assert (error["code"], error["param"]) == ("duplicate_rid", "rid")
        error_of(await http.post(NATIVE, json={**VALID[NATIVE], "text": ["x", "y"], "rid": ["b", "a"]}))
        assert (await http.post(CHAT, json={**VALID[CHAT], "rid": "a-2"})).status_code == 200
        assert (await first).status_code == 200
        assert (await http.post(CHAT, json={**VALID[CHAT], "rid": "a"})).status_code == 200


async def test_one_bad_prompt_of_a_batch_starts_none(client: FakeClient, http: httpx.AsyncClient) -> None:
    error_of(await http.post(NATIVE, json={"text": ["fine", ""]}))
    error_of(await http.post(TEXT, json={"prompt": ["fine", "x" * 600]}))
    assert client.requests == []


async def test_abort_by_rid_reaches_every_request_of_a_body() -> None:
    client = FakeClient(delay=0.02)
    async with connect(client) as http:
        body = {"prompt": ["a", "b"], "rid": "r", "max_tokens": 200, "ignore_eos": True}
        running = asyncio.create_task(http.post(TEXT, json=body))
        while len(client.requests) < 2:
            await asyncio.sleep(0)
        assert (await http.post("/abort_request", json={"rid": "r-p"})).json() == {"aborted": 0}
        assert (await http.post("/abort_request", json={"rid": "r"})).json() == {"aborted": 2}
        choices = (await running).json()["choices"]
        error_of(await http.post("/abort_request", json={}))
    assert [choice["finish_reason"] for choice in choices] == ["abort", "abort"]
    assert {"r-p0", "r-p1"} <= set(client.aborted)


async def test_an_unexpected_error_is_a_500_without_its_inside(
    client: FakeClient, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("secret path /etc")

    monkeypatch.setattr(client, "_answer", broken)
    for stream in (False, True):
        error = error_of(await http.post(CHAT, json={**VALID[CHAT], "stream": stream}), 500)
        assert "secret" not in error["message"]
    assert "secret path" in caplog.text


async def test_drain_refuses_new_requests_and_waits_for_running_ones() -> None:
    client = FakeClient(delay=0.02)
    async with connect(client) as http:
        serving = http._transport.app.state.serving  # type: ignore[attr-defined]
        running = asyncio.create_task(http.post(CHAT, json={**VALID[CHAT], "max_tokens": 10}))
        while not client.requests:
            await asyncio.sleep(0)
        assert not await serving.drain(0.01)
        error = error_of(await http.post(CHAT, json=VALID[CHAT]), 503)
        assert error["code"] == "shutting_down"
        error_of(await http.get("/readyz"), 503)
        assert (await http.get("/livez")).status_code == 200
        assert await serving.drain(10)
        assert (await running).status_code == 200
