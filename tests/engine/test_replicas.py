"""Several engines as one: which gets a request, what goes to all, and how they end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from sglang_core import Engine
from sglang_core.engine.link import ProcessLink
from sglang_core.engine.replicas import Replicas
from sglang_core.engine.requests import GenerateChunk, GenerateRequest
from sglang_core.errors import ConfigError, EngineDeadError, RequestError
from sglang_core.types import SamplingParams
from tests.engine.test_processes import is_running, wait_until

SETTINGS = {"model_path": "demo", "device": "cpu", "dtype": "float32", "max_total_tokens": 4096, "num_threads": 1}


class Lone:
    """An engine that answers when it is told to. `refuses`: adapters that it does not take."""

    def __init__(self, *refuses: str) -> None:
        self.asked: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.adapters: dict[str, str] = {}
        self.go_on = asyncio.Event()
        self.is_alive, self.flushes, self.refuses = True, True, refuses
        self.gauges: dict[str, float] = {}

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        self.asked.append(request)
        await self.go_on.wait()
        yield GenerateChunk(rid=request.rid or "drawn")

    async def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    async def flush_cache(self) -> bool:
        return self.flushes

    async def stats(self) -> dict[str, float]:
        return self.gauges

    async def load_lora_adapter(self, name: str, path: str, *, pinned: bool = False) -> None:
        if path in self.refuses:
            raise RequestError(f"{path} does not fit")
        self.adapters[name] = path

    async def unload_lora_adapter(self, name: str) -> None:
        if self.adapters.pop(name, None) is None:
            raise RequestError(f"no adapter {name}")


def replicas(num: int, method: str = "total_requests") -> tuple[Replicas, list[Lone]]:
    engines = [Lone() for _ in range(num)]
    return Replicas(engines, method), engines  # type: ignore[arg-type]


def request(num_tokens: int = 4, *, new: int = 8, n: int = 1, rid: str | None = None) -> GenerateRequest:
    return GenerateRequest(input_ids=[1] * num_tokens, sampling=SamplingParams(max_new_tokens=new, n=n), rid=rid)


async def ask(client: Replicas, *requests: GenerateRequest) -> list[asyncio.Task[list[GenerateChunk]]]:
    """Each is with its engine once the next is asked."""

    async def read(one: GenerateRequest) -> list[GenerateChunk]:
        return [chunk async for chunk in client.generate(one)]

    tasks = []
    for one in requests:
        tasks.append(asyncio.create_task(read(one)))
        await asyncio.sleep(0)
    return tasks


async def test_a_request_goes_where_fewest_are() -> None:
    client, engines = replicas(3)
    tasks = await ask(client, request(n=3), request(), request(), request(), request())
    assert [len(engine.asked) for engine in engines] == [1, 2, 2]
    engines[1].go_on.set()
    await asyncio.gather(*(task for i, task in enumerate(tasks) if i in (1, 3)))
    tasks += await ask(client, request(), request())
    assert len(engines[1].asked) == 4, "those that ended count no more"
    for engine in engines:
        engine.go_on.set()
    assert all(len(chunks) == 1 for chunks in await asyncio.gather(*tasks))
    assert all((load.requests, load.tokens) == (0, 0) for load in client._loads)


async def test_or_where_fewest_tokens_are() -> None:
    client, engines = replicas(2, "total_tokens")
    tasks = await ask(client, request(100), request(3), request(3), request(3, new=200), request(3))
    assert [[len(each.input_ids or []) for each in engine.asked] for engine in engines] == [[100, 3], [3, 3, 3]]
    for task in tasks:
        task.cancel()


async def test_or_in_turn() -> None:
    client, engines = replicas(2, "round_robin")
    tasks = await ask(client, request(n=9), request(), request(), request(), request())
    assert [len(engine.asked) for engine in engines] == [3, 2]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(load.requests == 0 for load in client._loads), "nor do those whose reader left"


async def test_a_rid_runs_once_whichever_engine_has_it() -> None:
    client, engines = replicas(2)
    (first,) = await ask(client, request(rid="r"))
    with pytest.raises(RequestError, match="rid 'r' is running already"):
        await anext(client.generate(request(rid="r")))
    engines[0].go_on.set()
    await first
    (again,) = await ask(client, request(rid="r"))
    engines[1].go_on.set()
    assert (await again)[0].rid == "r"


async def test_all_else_is_asked_of_all() -> None:
    client, (one, two) = replicas(2)
    await client.abort("r")
    assert one.aborted == two.aborted == ["r"]
    assert await client.flush_cache()
    two.flushes = False
    assert not await client.flush_cache()
    assert client.is_alive
    one.is_alive = False
    assert not client.is_alive


async def test_stats_are_sums_and_shares_are_means() -> None:
    client, (one, two) = replicas(2)
    one.gauges = {"running": 3, "token_usage": 0.5, "pool_usage_full": 0.5, "prompt_tokens": 30, "cached_tokens": 30}
    two.gauges = {"running": 1, "token_usage": 0.1, "pool_usage_full": 0.1, "prompt_tokens": 90, "cached_tokens": 0}
    one.gauges["cache_hit_rate"], two.gauges["cache_hit_rate"] = 1.0, 0.0
    stats = await client.stats()
    assert stats.pop("token_usage") == stats.pop("pool_usage_full") == pytest.approx(0.3)
    assert stats == {"running": 4, "prompt_tokens": 120, "cached_tokens": 30, "cache_hit_rate": 0.25}


async def test_an_adapter_is_everywhere_or_nowhere() -> None:
    client, (one, two) = replicas(2)
    await client.load_lora_adapter("a", "good")
    assert one.adapters == two.adapters == client.adapters == {"a": "good"}
    two.refuses = ("odd",)
    with pytest.raises(RequestError, match="odd does not fit"):
        await client.load_lora_adapter("b", "odd")
    assert one.adapters == two.adapters == {"a": "good"}
    await client.unload_lora_adapter("a")
    assert not one.adapters and not two.adapters


def pids(engine: Engine) -> list[int]:
    return [pid for each in engine.client.engines for pid in each._link.pids]  # type: ignore[attr-defined]


def test_two_engines_answer_as_one_and_end_together(engine: Engine) -> None:
    prompts: list[Any] = ["The capital of France is", "One, two, three,", "Hello", "Once upon"]
    greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    expected = [answer["output_ids"] for answer in engine.generate(prompts, greedy)]
    with Engine(**SETTINGS, dp_size=2) as two:  # type: ignore[arg-type]
        processes = pids(two)
        assert len(set(processes)) == 2
        assert [answer["output_ids"] for answer in two.generate(prompts, greedy)] == expected
        done = [asyncio.run_coroutine_threadsafe(each.stats(), two._loop).result() for each in two.client.engines]  # type: ignore[attr-defined]
        assert [stats["output_tokens"] for stats in done] == [16, 16], "each had two of the four"
        assert two.stats()["output_tokens"] == 32
        os.kill(processes[0], signal.SIGKILL)
        wait_until(lambda: not two.client.is_alive)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            two.generate(["Hello", "Once upon"], greedy)  # one for each
    wait_until(lambda: not any(map(is_running, processes)))


def test_one_that_cannot_start_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither can, and the one that takes longer to end is cancelled meanwhile: its sockets are closed all the same."""
    stopping: list[ProcessLink] = []
    closed: list[ProcessLink] = []
    stop, close = ProcessLink.stop, ProcessLink.closed

    def slowly(link: ProcessLink, grace: float) -> None:
        stopping.append(link)
        time.sleep(len(stopping) - 1)
        stop(link, grace)

    async def noted(link: ProcessLink) -> None:
        await close(link)
        closed.append(link)

    monkeypatch.setattr(ProcessLink, "stop", slowly)
    monkeypatch.setattr(ProcessLink, "closed", noted)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(ConfigError, match="max_total_tokens"):
        Engine(**(SETTINGS | {"max_total_tokens": 10**12}), dp_size=2)  # type: ignore[arg-type]
    assert len(closed) == 2
    wait_until(lambda: {child.pid for child in psutil.Process().children(recursive=True)} <= before)
    with pytest.raises(ConfigError, match="in_process=True runs one engine, and dp_size=2"):
        Engine(**SETTINGS, dp_size=2, in_process=True)  # type: ignore[arg-type]
