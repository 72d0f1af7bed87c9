from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from sglang_core.config import EngineConfig
from sglang_core.engine.requests import GenerateRequest
from sglang_core.server.serving import Serving
from sglang_core.server.sse import EventStream, event
from tests.server.fake_client import FakeClient


async def test_a_client_that_reads_nothing_and_hangs_up_frees_the_generator() -> None:
    hung_up, is_closed = asyncio.Event(), False

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal is_closed
        try:
            while True:
                yield event({})
        finally:
            is_closed = True

    async def receive() -> Any:
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":  # the socket is full
            hung_up.set()
            await asyncio.Event().wait()

    await EventStream(events(), {})({"type": "http"}, receive, send)
    assert is_closed


async def test_leaving_between_two_chunks_gives_the_request_up_at_once(client: FakeClient) -> None:
    serving = Serving(client, EngineConfig())
    chunks = serving.generate(GenerateRequest(input_ids=[1], rid="r"))
    await anext(chunks)
    assert serving.num_running == 1
    await chunks.aclose()
    assert client.given_up == ["r"]
    assert serving.num_running == 0
