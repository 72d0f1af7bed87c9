from __future__ import annotations

import asyncio
import re

import httpx
import pytest

from sglang_core.server import health
from tests.server.conftest import connect
from tests.server.fake_client import FakeClient
from tests.server.test_chat import events
from tests.server.test_validation import CHAT, VALID, error_of

PROBES = ("/livez", "/readyz", "/health", "/health_generate")


async def test_a_ready_server(http: httpx.AsyncClient) -> None:
    for path in PROBES:
        assert (await http.get(path)).json() == {"status": "ok"}


async def test_a_dead_engine_fails_every_probe(client: FakeClient, http: httpx.AsyncClient) -> None:
    client.alive = False
    for path in PROBES:
        assert error_of(await http.get(path), 503)["code"] == "unhealthy"


async def test_a_stuck_engine_fails_the_generating_probe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HEALTH_TIMEOUT", 0.05)
    client = FakeClient(delay=60)
    async with connect(client) as http:
        for reply in await asyncio.gather(http.get("/health_generate"), http.get("/health_generate")):
            assert "0.05 seconds" in error_of(reply, 503)["message"]
        assert (await http.get("/readyz")).status_code == 200
    assert client.given_up == [client.requests[0].rid]


async def test_probes_at_once_share_one_token() -> None:
    client = FakeClient(delay=0.05)
    async with connect(client) as http:
        replies = await asyncio.gather(*(http.get("/health_generate") for _ in range(5)))
    assert [reply.status_code for reply in replies] == [200] * 5
    assert len(client.requests) == 1
    assert client.requests[0].sampling.max_new_tokens == 1


async def test_a_full_queue_is_said(client: FakeClient, http: httpx.AsyncClient) -> None:
    client.queue_full = True
    assert "wait already" in error_of(await http.get("/health_generate"), 503)["message"]


async def test_flush(client: FakeClient, http: httpx.AsyncClient) -> None:
    assert (await http.post("/flush_cache")).json() == {"success": True}
    client.pinned = True
    assert error_of(await http.post("/flush_cache"), 409)["code"] == "cache_in_use"
    error_of(await http.get("/flush_cache"), 405)


async def test_info(http: httpx.AsyncClient) -> None:
    model = (await http.get("/model_info")).json()
    assert model == (await http.get("/get_model_info")).json()
    assert (model["model_path"], model["context_length"], model["is_generation"]) == ("/models/fake", 512, True)
    server = (await http.get("/server_info")).json()
    assert server["status"] == "ready"
    assert server["stats"]["running"] == 1
    assert (await http.get("/get_server_info")).json()["settings"] == server["settings"]


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"{name} is not in:\n{text}"
    return float(found[1])


async def test_metrics(client: FakeClient, http: httpx.AsyncClient) -> None:
    label = 'model_name="fake/model"'
    await http.post(CHAT, json={**VALID[CHAT], "max_tokens": 4})
    events(await http.post(CHAT, json={**VALID[CHAT], "max_tokens": 5, "n": 2, "stream": True}))
    client.fail_after = 1
    await http.post(CHAT, json={**VALID[CHAT], "stream": True})
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    text = response.text
    expected = {
        "num_running_reqs": 1,
        "num_queue_reqs": 2,
        "token_usage": 0.25,
        "cache_hit_rate": 0.5,
        "fallbacks_total": 3,
        "retractions_total": 4,
        "engine_up": 1,
        "generation_tokens_total": 4 + 2 * 5 + 1,
        "prompt_tokens_total": 3 * len("user: hi\nassistant: "),
        "cached_tokens_total": 3 * (len("user: hi\nassistant: ") // 2),
        "time_to_first_token_seconds_count": 3,  # streamed answers; a whole one's first token is not seen
        "inter_token_latency_seconds_count": 2 * 4,
        "e2e_request_latency_seconds_count": 3,
    }
    assert {name: value(text, f"sglang_{name}{{{label}}}") for name in expected} == expected
    ended = {
        how: value(text, f'sglang_num_requests_total{{finish_reason="{how}",{label}}}') for how in ("length", "error")
    }
    assert ended == {"length": 3, "error": 1}
    assert value(text, f"sglang_gen_throughput{{{label}}}") >= 0


async def test_metrics_of_a_dead_engine_say_so(client: FakeClient, http: httpx.AsyncClient) -> None:
    client.alive = False
    text = (await http.get("/metrics")).text
    assert value(text, 'sglang_engine_up{model_name="fake/model"}') == 0


async def test_metrics_can_be_off(client: FakeClient) -> None:
    async with connect(client, enable_metrics=False) as http:
        error_of(await http.get("/metrics"), 404)
        assert (await http.post(CHAT, json=VALID[CHAT])).status_code == 200


async def test_one_log_line_a_request_without_its_text(client: FakeClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sglang_core.server.serving")
    async with connect(client, log_requests=True) as http:
        await http.post(CHAT, json={**VALID[CHAT], "messages": [{"role": "user", "content": "my secret"}], "rid": "r7"})
    (line,) = [record.getMessage() for record in caplog.records]
    assert "rid=r7" in line and "completion=4" in line and "finish=length" in line
    assert "secret" not in line
