"""`bench serve` over a real socket, against a tiny OpenAI-like server in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sglang_core.bench.serve import (
    BenchError,
    LoadOptions,
    ServeResult,
    Target,
    find_vocab_size,
    open_client,
    run_serve,
)
from sglang_core.bench.workload import Prompt

JSON = "application/json"


class TinyServer:
    """HTTP/1.1, one request a connection at a time; counts what it was asked."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.paths: list[str] = []
        self.headers: list[str] = []
        self.fail_after = fail_after
        self.answered = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await self._head(reader):
            path = head.split()[1]
            self.paths.append(path)
            self.headers.append(head)
            length = next(
                (int(h.split(":")[1]) for h in head.split("\r\n") if h.lower().startswith("content-length")), 0
            )
            body = json.loads(await reader.readexactly(length) or b"{}")
            await self._answer(path, body, writer)
        writer.close()

    async def _head(self, reader: asyncio.StreamReader) -> str:
        try:
            return (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return ""

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            return await self._plain(writer, {"data": [{"id": "tiny"}]})
        if path == "/model_info":
            return await self._plain(writer, {"vocab_size": 321})
        if path == "/flush_cache":
            return await self._plain(writer, {})
        self.answered += 1
        if self.fail_after is not None and self.answered > self.fail_after:
            return await self._plain(writer, {"error": {"message": "full"}}, "429 Too Many Requests")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        events = [{"choices": [{"text": "x", "finish_reason": None}]}] * body["max_tokens"] + [
            {"choices": [], "usage": usage}
        ]
        for data in [*map(json.dumps, events), "[DONE]"]:
            chunk = f"data: {data}\n\n".encode()
            writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _plain(self, writer: asyncio.StreamWriter, value: object, status: str = "200 OK") -> None:
        content = json.dumps(value).encode()
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: {JSON}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
        )
        await writer.drain()


def against(server: TinyServer, use: Callable[[str], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        try:
            return await use(f"http://127.0.0.1:{port}")
        finally:
            listening.close()

    return asyncio.run(go())


def run_against(server: TinyServer, num_prompts: int, options: LoadOptions, api_key: str | None = None) -> ServeResult:
    async def use(url: str) -> ServeResult:
        target = Target(base_url=url, api_key=api_key)
        async with open_client(target) as client:
            return await run_serve(client, target, [Prompt(input_ids=[1, 2], output_len=3)] * num_prompts, options)

    result: ServeResult = against(server, use)
    return result


def test_a_run_counts_what_the_server_gave() -> None:
    server = TinyServer()
    result = run_against(server, 5, LoadOptions(num_warmup=2, flush_cache=True), api_key="sesame")
    assert result.config["model"] == "tiny"
    assert (result.summary.completed, result.summary.prompt_tokens, result.summary.output_tokens) == (5, 10, 15)
    assert result.summary.ttft is not None
    # The cache is emptied between the warm-up and the run.
    assert server.paths == ["/v1/models", *["/v1/completions"] * 2, "/flush_cache", *["/v1/completions"] * 5]
    assert all("authorization: bearer sesame" in head.lower() for head in server.headers)


def test_errors_are_counted_and_shown() -> None:
    summary = run_against(TinyServer(fail_after=3), 4, LoadOptions(num_warmup=1)).summary
    assert (summary.completed, summary.failed) == (2, 2)
    [(error, count)] = summary.errors.items()
    assert count == 2
    assert error.startswith("HTTP 429: ")


def test_a_warm_up_that_fails_measures_nothing() -> None:
    with pytest.raises(BenchError, match="warm-up request failed.*429"):
        run_against(TinyServer(fail_after=0), 4, LoadOptions())


def test_no_server_is_one_clear_error() -> None:
    async def go() -> None:
        target = Target(base_url="http://127.0.0.1:9")
        async with open_client(target) as client:
            await run_serve(client, target, [], LoadOptions())

    with pytest.raises(BenchError, match="no server answers at http://127.0.0.1:9"):
        asyncio.run(go())


def test_vocab_size_is_the_servers() -> None:
    async def use(url: str) -> int:
        async with open_client(Target(base_url=url)) as client:
            return await find_vocab_size(client)

    assert against(TinyServer(), use) == 321
