"""The load generator against a scripted server in virtual time: every latency is known beforehand."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from sglang_core.bench.load import HttpSender, run_load
from sglang_core.bench.metrics import RequestRecord, Summary, summarize
from sglang_core.bench.routes import ROUTES, Route
from sglang_core.bench.workload import Prompt, poisson_arrivals

from .virtual_time import run_virtual

PREFILL, STEP = 0.5, 0.1  # seconds that the scripted server takes
Events = Callable[[dict[str, Any]], AsyncIterator[bytes]]


def sse(event: object) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


class Scripted(httpx.AsyncBaseTransport):
    """Answers every request with the events of a script, in the loop's own time."""

    def __init__(self, script: Events, status: int = 200) -> None:
        self.script, self.status = script, status
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread())
        self.bodies.append(body)
        return httpx.Response(self.status, stream=_Stream(self._counted(body)))

    async def _counted(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        async for chunk in self.script(body):
            yield chunk
        self.running -= 1


class _Stream(httpx.AsyncByteStream):
    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            yield chunk


async def completions(body: dict[str, Any]) -> AsyncIterator[bytes]:
    """One token after PREFILL, then one every STEP, then the usage."""
    for i in range(body["max_tokens"]):
        await asyncio.sleep(STEP if i else PREFILL)
        # The second token is half a character: an event without text.
        yield sse({"choices": [{"text": "" if i == 1 else "x", "finish_reason": None}]})
    yield sse({"choices": [{"text": "", "finish_reason": "length"}]})
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    yield sse({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 2}}})
    yield b"data: [DONE]\n\n"


async def chat(body: dict[str, Any]) -> AsyncIterator[bytes]:
    yield sse({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for i in range(body["max_tokens"]):
        await asyncio.sleep(STEP if i else PREFILL)
        yield sse({"choices": [{"delta": {"content": "x"}}]})
    yield sse({"choices": [{"delta": {}, "finish_reason": "length"}]})
    yield sse({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}})
    yield b"data: [DONE]\n\n"


async def generate(body: dict[str, Any]) -> AsyncIterator[bytes]:
    """Two tokens an event."""
    for count in range(2, body["sampling_params"]["max_new_tokens"] + 1, 2):
        await asyncio.sleep(2 * STEP if count > 2 else PREFILL)
        yield sse(
            {"text": "x" * count, "meta_info": {"completion_tokens": count, "prompt_tokens": 3, "cached_tokens": 1}}
        )
    yield b"data: [DONE]\n\n"


def measure(
    transport: httpx.AsyncBaseTransport,
    route: Route,
    prompts: list[Prompt],
    rate: float = math.inf,
    max_concurrency: int | None = None,
) -> tuple[list[RequestRecord], Summary]:
    async def go() -> list[RequestRecord]:
        clock = asyncio.get_running_loop().time
        async with httpx.AsyncClient(transport=transport, base_url="http://scripted") as client:
            send = HttpSender(client, route, model="m", clock=clock)
            arrivals = poisson_arrivals(len(prompts), rate, seed=5)
            return await run_load(prompts, arrivals, send, max_concurrency=max_concurrency, clock=clock)

    records = run_virtual(go())
    return records, summarize(records)


def prompts(count: int, output_len: int = 4) -> list[Prompt]:
    return [Prompt(input_ids=[1, 2, 3], output_len=output_len) for _ in range(count)]


@pytest.mark.parametrize(("name", "script"), [("completions", completions), ("chat", chat)])
def test_openai_routes_measure_the_script(name: str, script: Events) -> None:
    _, s = measure(Scripted(script), ROUTES[name](), prompts(3))
    assert s.completed == 3
    assert s.output_tokens == 12
    assert s.tokens_per_event == 1.0
    for found, wanted in [(s.ttft, PREFILL), (s.itl, STEP), (s.tpot, STEP), (s.e2e, PREFILL + 3 * STEP)]:
        assert found is not None
        assert (found.mean, found.p99) == (pytest.approx(1e3 * wanted), pytest.approx(1e3 * wanted))
    assert s.output_throughput == pytest.approx(12 / (PREFILL + 3 * STEP))


def test_native_route_counts_the_tokens_of_each_event() -> None:
    records, s = measure(Scripted(generate), ROUTES["generate"](), prompts(1, output_len=6))
    assert records[0].token_counts == [2, 4, 6]
    assert s.itl is not None
    assert s.itl.mean == pytest.approx(1e3 * STEP)
    assert (s.prompt_tokens, s.cached_tokens, s.output_tokens) == (3, 1, 6)


def test_cached_tokens_come_from_usage() -> None:
    _, s = measure(Scripted(completions), ROUTES["completions"](), prompts(2))
    assert (s.prompt_tokens, s.cached_tokens) == (6, 4)


def test_requests_ask_for_exact_greedy_answers() -> None:
    server = Scripted(completions)
    measure(server, ROUTES["completions"](), prompts(1))
    body = server.bodies[0]
    assert body["prompt"] == [1, 2, 3]
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (4, True, 0.0)
    assert body["stream_options"] == {"include_usage": True}


def test_max_concurrency_holds_and_lateness_is_told() -> None:
    server = Scripted(completions)
    records, s = measure(server, ROUTES["completions"](), prompts(6), max_concurrency=2)
    assert server.most_running == 2
    assert [r.sent for r in records] == pytest.approx([0, 0, 0.8, 0.8, 1.6, 1.6])
    assert s.late is not None
    assert s.late.max == pytest.approx(1600)
    assert s.ttft is not None
    assert s.ttft.max == pytest.approx(1e3 * PREFILL)  # from when it was sent


def test_requests_leave_at_their_poisson_times() -> None:
    records, _ = measure(Scripted(completions), ROUTES["completions"](), prompts(20), rate=4.0)
    assert [r.sent for r in records] == pytest.approx(poisson_arrivals(20, 4.0, seed=5))
    assert records == sorted(records, key=lambda r: r.sent)


def test_a_refusal_is_that_requests_error() -> None:
    async def refusal(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b'{"error": {"message": "too long"}}'

    records, s = measure(Scripted(refusal, status=400), ROUTES["completions"](), prompts(2))
    assert (s.completed, s.failed) == (0, 2)
    assert records[0].error.startswith("HTTP 400: ")
    assert "too long" in records[0].error


@pytest.mark.parametrize("name", sorted(ROUTES))
def test_an_error_inside_a_stream_is_an_error(name: str) -> None:
    async def broken(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield sse({"choices": [{"text": "x", "delta": {"content": "x"}}], "meta_info": {"completion_tokens": 1}})
        yield sse({"error": {"message": "engine died"}})

    records, _ = measure(Scripted(broken), ROUTES[name](), prompts(1))
    assert records[0].error == "engine died"


def test_streams_that_say_nothing_or_nonsense_are_errors() -> None:
    async def empty(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b"data: [DONE]\n\n"

    async def nonsense(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b"data: {oops\n\n"

    assert (
        measure(Scripted(empty), ROUTES["completions"](), prompts(1))[0][0].error == "the stream ended without a token"
    )
    assert measure(Scripted(nonsense), ROUTES["completions"](), prompts(1))[0][0].error.startswith("malformed event")


def test_events_cut_anywhere_are_put_together() -> None:
    async def crumbs(body: dict[str, Any]) -> AsyncIterator[bytes]:
        async for chunk in completions(body):
            for at in range(0, len(chunk), 5):
                yield chunk[at : at + 5]

    _, s = measure(Scripted(crumbs), ROUTES["completions"](), prompts(1))
    assert s.output_tokens == 4
    assert s.ttft is not None
    assert s.ttft.mean == pytest.approx(1e3 * PREFILL)
