"""Sends requests when they are due and notes when each token comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx

from sglang_core.bench.metrics import RequestRecord
from sglang_core.bench.routes import News, Route, server_events
from sglang_core.bench.workload import Prompt

Clock = Callable[[], float]
Send = Callable[[Prompt, RequestRecord], Awaitable[None]]


class HttpSender:
    """Sends one prompt over a route and fills in its record. Never raises for what the server does."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        route: Route,
        *,
        model: str,
        temperature: float = 0.0,
        extra_body: Mapping[str, Any] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._client, self._route, self._clock = client, route, clock
        self._model, self._temperature, self._extra = model, temperature, dict(extra_body or {})

    async def __call__(self, prompt: Prompt, record: RequestRecord) -> None:
        body = self._route.body(prompt, self._model, self._temperature) | self._extra
        record.wanted_tokens = prompt.output_len
        record.prompt_tokens = len(prompt.input_ids or ())  # until the server says better
        record.sent = self._clock()
        try:
            await self._stream(body, record)
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}".rstrip(": ")
        except ValueError as error:  # an event that is no JSON
            record.error = f"malformed event: {error}"
        record.end = self._clock()
        if record.ok and not record.token_times:
            record.error = "the stream ended without a token"

    async def _stream(self, body: dict[str, Any], record: RequestRecord) -> None:
        async with self._client.stream("POST", self._route.path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                record.error = f"HTTP {response.status_code}: {text[:200]}"
                return
            async for event in server_events(response.aiter_bytes()):
                self._note(self._route.read(event), record)
                if record.error:
                    return

    def _note(self, news: News, record: RequestRecord) -> None:
        if news.error is not None:
            record.error = news.error
            return
        before = record.output_tokens
        if news.output_tokens is not None:
            record.output_tokens = news.output_tokens
        elif news.has_tokens:
            record.output_tokens += 1
        if news.has_tokens and record.output_tokens > before:
            record.token_times.append(self._clock())
            record.token_counts.append(record.output_tokens)
        if news.prompt_tokens is not None:
            record.prompt_tokens = news.prompt_tokens
        if news.cached_tokens is not None:
            record.cached_tokens = news.cached_tokens


async def run_load(
    prompts: Sequence[Prompt],
    arrivals: Sequence[float],
    send: Send,
    *,
    max_concurrency: int | None = None,
    clock: Clock = time.perf_counter,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> list[RequestRecord]:
    """Send `prompts[i]` at `arrivals[i]` seconds from now, at most `max_concurrency` at once; a record each, in order."""
    start = clock()
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None

    async def one(prompt: Prompt, arrival: float) -> RequestRecord:
        record = RequestRecord(due=start + arrival)
        await asyncio.sleep(max(0.0, record.due - clock()))
        async with AsyncExitStack() as stack:
            if gate is not None:
                await stack.enter_async_context(gate)
            await send(prompt, record)
        on_done(record)
        return record

    return await asyncio.gather(*(one(p, a) for p, a in zip(prompts, arrivals, strict=True)))
