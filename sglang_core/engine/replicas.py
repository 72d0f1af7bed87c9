"""Several engines as one client: a request goes to one of them, all else to all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from sglang_core.config import EngineConfig
from sglang_core.engine.client import EngineClient, duplicate_rid, load_tokenizer
from sglang_core.engine.requests import Client, EngineInfo, GenerateChunk, GenerateRequest, Tokenizer
from sglang_core.errors import RequestError

CHARS_PER_TOKEN = 4  # a guess, of prompts that are text still
SHARES = (
    "token_usage",
    "output_reserve",
    "pool_usage_",
)  # gauges, by how they begin, that are shares of each engine's own


async def start_client(config: EngineConfig) -> Client:
    """The engine that the config describes, or its replicas, once all are ready. Raises what their start raises."""
    return await (EngineClient if config.parallel.dp_size == 1 else Replicas).start(config)


@dataclass(slots=True)
class Load:
    """What an engine was given and has not answered yet: requests, and tokens of their prompts and at most of their answers."""

    requests: int = 0
    tokens: int = 0


class Replicas:
    """See `requests.Client`. Alive while all its engines are: a server short of one is replaced, as one short of a rank is.

    Which engine has a prompt's prefix in its cache is not looked at: requests of one conversation may go to several.
    """

    def __init__(self, engines: Sequence[Client], method: str) -> None:
        self.engines, self._method = list(engines), method
        self._loads = [Load() for _ in engines]
        self._last = len(self.engines) - 1  # the engine that got the last request
        self._rids: set[str] = set()

    @classmethod
    async def start(cls, config: EngineConfig) -> Replicas:
        """All engines at once. Where one fails the others are ended, and its error is raised."""
        tokenizer = asyncio.create_task(asyncio.to_thread(load_tokenizer, config))
        starting = [
            asyncio.create_task(EngineClient.start(config, replica=replica, tokenizer=tokenizer))
            for replica in range(config.parallel.dp_size)
        ]
        try:
            return cls(await asyncio.gather(*starting), config.parallel.load_balance_method)
        except BaseException:
            for task in starting:
                task.cancel()
            outcomes = await asyncio.gather(*starting, return_exceptions=True)
            await asyncio.gather(*(engine.close() for engine in outcomes if isinstance(engine, EngineClient)))
            raise

    @property
    def info(self) -> EngineInfo:
        """Of one engine: the one with the smallest pool, which decides what is too long."""
        return min((engine.info for engine in self.engines), key=lambda info: info.max_total_tokens)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engines[0].tokenizer

    @property
    def adapters(self) -> Mapping[str, str]:
        return self.engines[0].adapters

    @property
    def is_alive(self) -> bool:
        return all(engine.is_alive for engine in self.engines)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        """Stream one request, from the engine that is chosen now."""
        if request.rid is not None and request.rid in self._rids:
            raise duplicate_rid(request.rid)
        chosen = self._choose()
        load, tokens = self._loads[chosen], _num_tokens(request)
        load.requests += request.sampling.n
        load.tokens += tokens
        named = {request.rid} if request.rid is not None else set[str]()
        self._rids |= named
        try:
            async with contextlib.aclosing(self.engines[chosen].generate(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
        finally:
            self._rids -= named
            load.requests -= request.sampling.n
            load.tokens -= tokens

    async def abort(self, rid: str) -> None:
        await asyncio.gather(*(engine.abort(rid) for engine in self.engines))

    async def flush_cache(self) -> bool:
        return all(await asyncio.gather(*(engine.flush_cache() for engine in self.engines)))

    async def stats(self) -> dict[str, float]:
        """Sums over the engines; of what is a share, the mean."""
        each = await asyncio.gather(*(engine.stats() for engine in self.engines))
        names = dict.fromkeys(name for stats in each for name in stats)
        total = {name: sum(stats.get(name, 0.0) for stats in each) for name in names}
        made = {name: value / len(each) if name.startswith(SHARES) else value for name, value in total.items()}
        if prompt := total.get("prompt_tokens"):
            made["cache_hit_rate"] = total["cached_tokens"] / prompt
        return made

    async def load_lora_adapter(self, name: str, path: str, *, pinned: bool = False) -> None:
        """See `requests.Client`. The first engine's refusal is all engines'; where a later one refuses, nobody has the adapter."""
        first, *others = self.engines
        await first.load_lora_adapter(name, path, pinned=pinned)
        loading = [engine.load_lora_adapter(name, path, pinned=pinned) for engine in others]
        outcomes = await asyncio.gather(*loading, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                await self._unload_where_loaded(name)
                raise outcome

    async def unload_lora_adapter(self, name: str) -> None:
        await asyncio.gather(*(engine.unload_lora_adapter(name) for engine in self.engines))

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self.engines))

    def kill(self) -> None:
        for engine in self.engines:
            engine.kill()

    def _choose(self) -> int:
        """An engine's place. Of those that the method finds alike, the next after the last chosen."""
        num = len(self.engines)
        turns = [(self._last + 1 + i) % num for i in range(num)]
        match self._method:
            case "total_requests":
                self._last = min(turns, key=lambda i: self._loads[i].requests)
            case "total_tokens":
                self._last = min(turns, key=lambda i: self._loads[i].tokens)
            case _:
                self._last = turns[0]
        return self._last

    async def _unload_where_loaded(self, name: str) -> None:
        for engine in self.engines:
            with contextlib.suppress(RequestError):
                await engine.unload_lora_adapter(name)


def _num_tokens(request: GenerateRequest) -> int:
    prompt = len(request.input_ids) if request.input_ids is not None else len(request.text or "") // CHARS_PER_TOKEN
    return request.sampling.n * (prompt + request.sampling.max_new_tokens)
