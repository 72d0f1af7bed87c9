"""`chat`: the conversation it keeps, its commands, and what it sends to a server."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from rich.console import Console

from sglang_core.cli.chat import converse
from sglang_core.cli.talkers import HttpTalker, Message
from sglang_core.errors import EngineDeadError, RequestError


class Echo:
    """Answers with the number of messages it was given."""

    name = "echo"

    def __init__(self) -> None:
        self.heard: list[list[Message]] = []
        self.trouble: Exception | None = None

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        self.heard.append([dict(m) for m in messages])
        yield "answer "
        if messages[-1]["content"] == "stop me":
            raise KeyboardInterrupt
        if self.trouble is not None:
            raise self.trouble
        yield f"[{len(messages)}]"

    async def close(self) -> None:
        return


Talk = Callable[..., str]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Talk:
    def run(talker: Any, *lines: str, system: str | None = None) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        console = Console(file=io.StringIO(), highlight=False, width=100)
        loop = asyncio.new_event_loop()
        try:
            converse(talker, loop.run_until_complete, console, system=system)
        finally:
            loop.close()
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    return run


def contents(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages]


def test_the_conversation_grows(talk: Talk) -> None:
    echo = Echo()
    shown = talk(echo, "one", "two")
    assert contents(echo.heard[1]) == ["one", "answer [1]", "two"]
    assert "answer [3]" in shown  # square brackets are text, not markup


def test_reset_keeps_the_system_message(talk: Talk) -> None:
    echo = Echo()
    talk(echo, "one", "/reset", "two", "/system be brief", "three", "/system", "four", system="be kind")
    assert [contents(h) for h in echo.heard] == [
        ["be kind", "one"],
        ["be kind", "two"],
        ["be brief", "three"],
        ["four"],
    ]


def test_exit_ends_before_the_end_of_input(talk: Talk) -> None:
    echo = Echo()
    talk(echo, "one", "/exit", "two")
    assert len(echo.heard) == 1


def test_unknown_commands_are_not_sent(talk: Talk) -> None:
    echo = Echo()
    assert "did you mean /reset?" in talk(echo, "/rest", "/help")
    assert echo.heard == []


def test_a_stopped_answer_stays_in_the_conversation(talk: Talk) -> None:
    echo = Echo()
    assert "(stopped)" in talk(echo, "stop me", "go on")
    assert contents(echo.heard[1]) == ["stop me", "answer ", "go on"]


def test_a_refused_turn_is_taken_back(talk: Talk) -> None:
    echo = Echo()
    echo.trouble = RequestError("too long")
    assert "too long" in talk(echo, "one", "two")
    assert contents(echo.heard[1]) == ["two"]


def test_a_dead_engine_ends_the_chat(talk: Talk) -> None:
    echo = Echo()
    echo.trouble = EngineDeadError("gone")
    with pytest.raises(EngineDeadError):
        talk(echo, "one", "two")


def ask(handler: Callable[[httpx.Request], httpx.Response], **sampling: Any) -> list[str]:
    async def go() -> list[str]:
        client = httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://server")
        talker = HttpTalker(client, "m", sampling)
        pieces = [piece async for piece in talker.answer([{"role": "user", "content": "hi"}])]
        await talker.close()
        return pieces

    return asyncio.run(go())


def test_http_talker_streams_the_content_of_deltas() -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        deltas = [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
        events = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
        return httpx.Response(200, text="".join(events) + "data: [DONE]\n\n")

    assert ask(handler, temperature=0.5, max_new_tokens=9) == ["Hel", "lo"]
    expected = {
        "model": "m",
        "stream": True,
        "temperature": 0.5,
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert bodies == [expected]


def test_http_talker_repeats_what_the_server_refuses() -> None:
    with pytest.raises(RequestError, match="answers 400: no template"):
        ask(lambda request: httpx.Response(400, text="no template"))


def test_http_talker_says_when_the_server_is_gone() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(EngineDeadError, match="http://server"):
        ask(gone)
