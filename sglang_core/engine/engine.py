"""`Engine`: the offline engine, in the shape of SGLang's: generate with prompts or ids, one or a batch, streaming or not."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from sglang_core.config import EngineConfig
from sglang_core.engine.client import EngineClient
from sglang_core.engine.native import answer, parse_sampling_params
from sglang_core.engine.requests import EngineInfo, GenerateChunk, GenerateRequest
from sglang_core.errors import RequestError
from sglang_core.types import LogprobParams

T = TypeVar("T")
Answer = dict[str, Any]


class Engine:
    """A model in its own processes (or, with `in_process=True`, in a thread of this one). Use it as a context manager.

    >>> with Engine(model_path="demo") as engine:
    ...     engine.generate("The capital of France is", {"temperature": 0, "max_new_tokens": 4})["text"]
    """

    def __init__(self, *, log_level: str = "error", **settings: Any) -> None:
        """`settings` are the server's, by flat name. Returns when the model is ready; raises ConfigError and its siblings."""
        config = EngineConfig.from_flat(log_level=log_level, **settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._wait(EngineClient.start(config))
        except BaseException:
            self._stop_loop()
            raise
        self._open = True

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    @property
    def client(self) -> EngineClient:
        """The asyncio client; its calls belong on its own loop."""
        return self._client

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
        return_logprob: bool | Sequence[bool] = False,
        logprob_start_len: int | Sequence[int] | None = None,
        top_logprobs_num: int | Sequence[int] | None = None,
        rid: str | Sequence[str] | None = None,
        priority: int = 0,
    ) -> Any:
        """One prompt -> a dict, several -> a list of them: {"text", "output_ids", "meta_info"}. With n > 1, n a prompt.

        With `stream`, an iterator of such dicts, texts cumulative, each with the prompt's place as "index".
        """
        requests, single = self._requests(
            prompt,
            sampling_params,
            input_ids,
            return_logprob,
            logprob_start_len,
            top_logprobs_num,
            rid,
            priority,
            stream,
        )
        if stream:
            return self._stream(requests)
        answers = self._wait(self._all(requests))
        return answers[0] if single and len(answers) == 1 else answers

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
        return_logprob: bool | Sequence[bool] = False,
        logprob_start_len: int | Sequence[int] | None = None,
        top_logprobs_num: int | Sequence[int] | None = None,
        rid: str | Sequence[str] | None = None,
        priority: int = 0,
    ) -> Any:
        """`generate` for asyncio code, on any loop; with `stream` it gives an async iterator."""
        requests, single = self._requests(
            prompt,
            sampling_params,
            input_ids,
            return_logprob,
            logprob_start_len,
            top_logprobs_num,
            rid,
            priority,
            stream,
        )
        if stream:
            return self._async_stream(requests)
        answers = await asyncio.wrap_future(self._submit(self._all(requests)))
        return answers[0] if single and len(answers) == 1 else answers

    def abort(self, rid: str = "") -> None:
        """End the request of that rid; "" ends all."""
        self._wait(self._client.abort(rid))

    def flush_cache(self) -> bool:
        """Forget cached prefixes; False where running requests hold some."""
        return self._wait(self._client.flush_cache())

    def stats(self) -> dict[str, float]:
        return self._wait(self._client.stats())

    def shutdown(self) -> None:
        """End the engine's processes. Safe to call twice."""
        if self._open:
            self._open = False
            self._wait(self._client.close())
            self._stop_loop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _requests(
        self,
        prompt: Any,
        sampling_params: Any,
        input_ids: Any,
        return_logprob: Any,
        logprob_start_len: Any,
        top_logprobs_num: Any,
        rid: Any,
        priority: int,
        stream: bool,
    ) -> tuple[list[GenerateRequest], bool]:
        if (prompt is None) == (input_ids is None):
            raise RequestError("give exactly one of prompt and input_ids", param="prompt")
        if prompt is not None:
            single = isinstance(prompt, str)
            texts, ids = ([prompt] if single else list(prompt)), None
        else:
            single = bool(input_ids) and isinstance(input_ids[0], int)
            texts, ids = None, ([list(input_ids)] if single else [list(each) for each in input_ids])
        count = len(texts if texts is not None else ids or [])

        def each(value: Any, name: str) -> list[Any]:
            if not isinstance(value, list | tuple):
                return [value] * count
            if len(value) != count:
                raise RequestError(
                    f"{name} has {len(value)} entries for {count} prompts; give one each, or one for all", param=name
                )
            return list(value)

        wants, starts = each(return_logprob, "return_logprob"), each(logprob_start_len, "logprob_start_len")
        tops, params, rids = (
            each(top_logprobs_num, "top_logprobs_num"),
            each(sampling_params, "sampling_params"),
            each(rid, "rid"),
        )
        requests = [
            GenerateRequest(
                text=texts[i] if texts is not None else None,
                input_ids=ids[i] if ids is not None else None,
                sampling=parse_sampling_params(params[i] or {}),
                logprob=LogprobParams(
                    top_logprobs_num=tops[i] or 0, logprob_start_len=-1 if starts[i] is None else starts[i]
                )
                if wants[i]
                else None,
                rid=rids[i],
                priority=priority,
                stream=stream,
            )
            for i in range(count)
        ]
        return requests, single

    async def _all(self, requests: list[GenerateRequest]) -> list[Answer]:
        answers = await asyncio.gather(*(self._collect(request) for request in requests))
        return [answer for group in answers for answer in group]

    async def _collect(self, request: GenerateRequest) -> list[Answer]:
        started = time.monotonic()
        chunks: dict[int, list[GenerateChunk]] = {index: [] for index in range(request.sampling.n)}
        async for chunk in self._client.generate(request):
            chunks[chunk.index].append(chunk)
        return [answer(parts, request, time.monotonic() - started) for parts in chunks.values()]

    async def _events(self, requests: list[GenerateRequest]) -> AsyncIterator[Answer]:
        """Answers of every request as they grow, merged."""
        events: asyncio.Queue[Answer | Exception | None] = asyncio.Queue()

        async def follow(place: int, request: GenerateRequest) -> None:
            started = time.monotonic()
            chunks: dict[int, list[GenerateChunk]] = {index: [] for index in range(request.sampling.n)}
            try:
                async for chunk in self._client.generate(request):
                    chunks[chunk.index].append(chunk)
                    grown = answer(chunks[chunk.index], request, time.monotonic() - started)
                    events.put_nowait(grown | {"index": place * request.sampling.n + chunk.index})
            except Exception as e:
                events.put_nowait(e)
            events.put_nowait(None)

        tasks = [asyncio.create_task(follow(place, request)) for place, request in enumerate(requests)]
        try:
            running = len(tasks)
            while running:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    running -= 1
                else:
                    yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _stream(self, requests: list[GenerateRequest]) -> Iterator[Answer]:
        handed: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for event in self._events(requests):
                    handed.put(event)
                handed.put(None)
            except BaseException as e:
                handed.put(e)
                raise

        future = self._submit(pump())
        try:
            while (event := handed.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            future.cancel()

    async def _async_stream(self, requests: list[GenerateRequest]) -> AsyncIterator[Answer]:
        events = self._stream(requests)
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event
        finally:
            await asyncio.to_thread(events.close)  # type: ignore[attr-defined]

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        result: T = self._submit(coroutine).result()
        return result

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
