"""The client's side of an engine that dies or misbehaves at an odd moment. The engine is the test: it says what it likes, when it likes."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from sglang_core import Engine
from sglang_core.config import EngineConfig
from sglang_core.engine.client import EngineClient
from sglang_core.engine.requests import GenerateRequest
from sglang_core.errors import EngineDeadError
from sglang_core.types import AddReq, FinishReason, OutputBatch, ReqOutput, SamplingParams, ToEngine


class Wire:
    """A link with nothing behind it."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def keys(self) -> list[str]:
        return [message.rid for message in self.sent if isinstance(message, AddReq)]


def lone_client(engine: Engine) -> tuple[EngineClient, Wire]:
    """A client that believes its engine to be ready. `engine` lends it the facts."""
    client = EngineClient(EngineConfig.from_flat(in_process=True))
    client.info, client.tokenizer = engine.client.info, engine.client.tokenizer
    wire = client._link = Wire()  # type: ignore[assignment]
    client._ready.set_result({})
    return client, wire  # type: ignore[return-value]


def say(client: EngineClient, key: str, *token_ids: int, finish: str = "") -> None:
    reason = FinishReason(finish) if finish else None  # type: ignore[arg-type]
    client._on_message(OutputBatch(outputs=[ReqOutput(rid=key, token_ids=list(token_ids), finish_reason=reason)]))


async def test_a_death_while_the_reader_is_busy_with_another_answer_is_not_taken_for_the_end(engine: Engine) -> None:
    client, wire = lone_client(engine)
    chunks = client.generate(GenerateRequest(text="Hi", sampling=SamplingParams(n=2), rid="r"))
    first = asyncio.ensure_future(anext(chunks))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    first_key, second_key = wire.keys()
    say(client, second_key, 5, finish="length")
    assert (await first).index == 1
    client._die("gone")  # before the reader asks again; the other answer has nothing yet
    with pytest.raises(EngineDeadError, match="gone"):
        await anext(chunks)
    assert not client._answers and not client._groups and first_key != second_key


async def test_a_death_while_a_long_prompt_is_tokenised_is_told(engine: Engine) -> None:
    client, _ = lone_client(engine)
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        def encode(self, text: str, **kwargs: Any) -> list[int]:
            begun.set()
            assert go_on.wait(10)
            return [5]

    client.tokenizer = Slow()  # type: ignore[assignment]
    chunks = client.generate(GenerateRequest(text="a" * 5000))
    first = asyncio.ensure_future(anext(chunks))  # type: ignore[arg-type]
    await asyncio.to_thread(begun.wait, 10)
    client._die("gone")
    go_on.set()
    with pytest.raises(EngineDeadError, match="gone"):
        await asyncio.wait_for(first, 10)


async def test_output_that_cannot_be_decoded_ends_its_request_only(engine: Engine) -> None:
    client, wire = lone_client(engine)
    good = client.generate(GenerateRequest(text="Hi", rid="good"))
    bad = client.generate(GenerateRequest(text="Hi", rid="bad"))
    waiting = [asyncio.ensure_future(anext(chunks)) for chunks in (good, bad)]  # type: ignore[arg-type]
    await asyncio.sleep(0)
    good_key, bad_key = wire.keys()
    broken = ReqOutput(rid=bad_key, token_ids=["no id"])  # type: ignore[list-item]
    client._on_message(OutputBatch(outputs=[broken, ReqOutput(rid=good_key, token_ids=[5])]))
    assert (await waiting[0]).token_ids == [5]
    with pytest.raises(Exception, match="."):
        await waiting[1]
    await good.aclose()  # type: ignore[attr-defined]
    assert not client._answers


async def test_without_stream_an_answer_comes_once_and_whole(engine: Engine) -> None:
    client, wire = lone_client(engine)
    chunks = client.generate(GenerateRequest(text="Hi", sampling=SamplingParams(n=2), stream=False))
    first = asyncio.ensure_future(anext(chunks))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    one, two = wire.keys()
    say(client, one, 5)
    say(client, two, 6, finish="length")
    assert (await first).index == 1
    say(client, one, 7, finish="length")
    (rest,) = [chunk async for chunk in chunks]
    assert (rest.index, rest.token_ids) == (0, [5, 7])


async def test_nothing_comes_back_to_life(engine: Engine) -> None:
    client, wire = lone_client(engine)
    chunks = client.generate(GenerateRequest(text="Hi"))
    first = asyncio.ensure_future(anext(chunks))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    client._die("hung")
    say(client, wire.keys()[0], 5, finish="length")  # it was only slow
    with pytest.raises(EngineDeadError, match="hung"):
        await first
    assert not client.is_alive
