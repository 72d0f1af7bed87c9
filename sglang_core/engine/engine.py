"""`Engine`: the offline engine, in the shape of SGLang's: generate with prompts or ids, one or a batch, streaming or not."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

from sglang_core.config import EngineConfig
from sglang_core.engine.native import (
    Count,
    Priority,
    StartLen,
    answer,
    checked,
    checked_text,
    parse_sampling_params,
)
from sglang_core.engine.replicas import start_client
from sglang_core.engine.requests import Client, EngineInfo, GenerateChunk, GenerateRequest
from sglang_core.errors import EngineDeadError, RequestError
from sglang_core.types import LogprobParams

T = TypeVar("T")
Answer = dict[str, Any]
SamplingDict = dict[str, Any]  # SGLang's names; see `SamplingParams`


class GenerateOptions(TypedDict, total=False):
    """What `generate` also takes. A list has one entry a prompt; anything else is for all."""

    input_ids: Sequence[int] | Sequence[Sequence[int]]  # in place of prompts
    return_logprob: bool | Sequence[bool]
    logprob_start_len: int | Sequence[int] | None  # first input position with logprobs; none by default
    top_logprobs_num: int | Sequence[int] | None
    rid: str | Sequence[str] | None
    priority: int
    lora_path: str | Sequence[str | None] | None  # name of a LoRA adapter, as SGLang calls it


class Engine:
    """A model in its own processes (or, with `in_process=True`, in a thread of this one). Use it as a context manager.

    >>> with Engine(model_path="demo") as engine:
    ...     engine.generate("The capital of France is", {"temperature": 0, "max_new_tokens": 4})["text"]
    """

    def __init__(self, *, log_level: str = "error", **settings: Any) -> None:
        """`settings` are the server's, by flat name. Returns when the model is ready; raises ConfigError and its siblings."""
        config = EngineConfig.from_flat(log_level=log_level, **settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="engine-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._wait(start_client(config))
        except BaseException:  # Ctrl-C while the model loads, too
            _stop(self._loop, self._thread)
            raise
        self._open = True
        # Without a shutdown() the processes end when the Engine is dropped, and at the latest when the interpreter ends.
        self._abandon = weakref.finalize(self, _abandon, self._client, self._loop)

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    @property
    def client(self) -> Client:
        """The asyncio client; its calls belong on its own loop."""
        return self._client

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: SamplingDict | Sequence[SamplingDict] | None = None,
        *,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """One prompt -> a dict, several -> a list of them: {"text", "output_ids", "meta_info"}. With n > 1, n a prompt.

        With `stream`, an iterator of such dicts, texts cumulative, each with the prompt's place as "index".
        """
        requests, single = _requests(prompt, sampling_params, stream, options)
        if stream:
            return self._stream(requests)
        answers = self._wait(self._all(requests))
        return answers[0] if single and len(answers) == 1 else answers

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: SamplingDict | Sequence[SamplingDict] | None = None,
        *,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """`generate` for asyncio code, on any loop; with `stream` it gives an async iterator."""
        requests, single = _requests(prompt, sampling_params, stream, options)
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

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> None:
        """Serve a LoRA adapter under a name, while requests run. Needs `enable_lora` or `lora_paths`.

        Where the name is taken, requests from now on get these weights. Raises RequestError that says what does not fit.
        """
        self._wait(self._client.load_lora_adapter(lora_name, lora_path, pinned=pinned))

    def unload_lora_adapter(self, lora_name: str) -> None:
        """Take no more requests for an adapter, and wait for those that run with it."""
        self._wait(self._client.unload_lora_adapter(lora_name))

    def stats(self) -> dict[str, float]:
        return self._wait(self._client.stats())

    def shutdown(self) -> None:
        """End the engine's processes. Safe to call twice."""
        if self._open:
            self._open = False
            try:
                self._wait(self._client.close())
            finally:
                _stop(self._loop, self._thread)
                self._abandon()  # nothing is left of it, unless a second Ctrl-C came

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    async def _all(self, requests: list[GenerateRequest]) -> list[Answer]:
        """The first that fails ends the others: nobody would read their answers."""
        tasks = [asyncio.create_task(self._collect(request)) for request in requests]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)
        return [answer for group in answers for answer in group]

    async def _collect(self, request: GenerateRequest) -> list[Answer]:
        started = time.monotonic()
        chunks: dict[int, list[GenerateChunk]] = {index: [] for index in range(request.sampling.n)}
        async for chunk in self._client.generate(request):
            chunks[chunk.index].append(chunk)
        return [answer(parts, request, time.monotonic() - started) for parts in chunks.values()]

    async def _events(self, requests: list[GenerateRequest]) -> AsyncIterator[Answer]:
        """Answers of every request as they grow, merged. While the reader is busy they grow unseen, and are not queued."""
        events: asyncio.Queue[Answer | Exception | None] = asyncio.Queue(maxsize=len(requests))

        async def follow(place: int, request: GenerateRequest) -> None:
            started = time.monotonic()
            chunks: dict[int, list[GenerateChunk]] = {index: [] for index in range(request.sampling.n)}
            try:
                async for chunk in self._client.generate(request):
                    chunks[chunk.index].append(chunk)
                    grown = answer(chunks[chunk.index], request, time.monotonic() - started)
                    await events.put(grown | {"index": place * request.sampling.n + chunk.index})
            except Exception as e:
                await events.put(e)
            await events.put(None)

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
            await _cancel(tasks)

    def _stream(self, requests: list[GenerateRequest]) -> Iterator[Answer]:
        handed: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()
        room = asyncio.Semaphore(1)  # the reader's thread takes one while the loop prepares the next

        async def pump() -> None:
            try:
                async for event in self._events(requests):
                    await room.acquire()
                    handed.put(event)
                handed.put(None)
            except BaseException as e:
                handed.put(e)
                raise

        future = self._submit(pump())
        try:
            while (event := handed.get()) is not None:
                if isinstance(event, asyncio.CancelledError):
                    raise EngineDeadError("the engine was shut down")
                if isinstance(event, BaseException):
                    raise event
                with contextlib.suppress(RuntimeError):  # the loop ended meanwhile: what it had to say is handed over
                    self._loop.call_soon_threadsafe(room.release)
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
        if self._loop.is_closed():
            coroutine.close()
            raise EngineDeadError("the engine was shut down")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Its result. Where the caller is interrupted the work is, too."""
        future = self._submit(coroutine)
        try:
            result: T = future.result()
            return result
        except BaseException:
            future.cancel()
            raise


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        if not task.cancelling():  # one that was cancelled before is cleaning up
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.closing(loop):
        loop.run_forever()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """End what still runs on the loop, so that whoever waits for it hears, and the loop itself."""

    async def rest() -> None:
        await _cancel(asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run_coroutine_threadsafe(rest(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def _abandon(client: Client, loop: asyncio.AbstractEventLoop) -> None:
    """From any thread, the loop's own included: kill the engine, and end the loop once it has cleaned up."""
    client.kill()
    if not loop.is_closed() and not sys.is_finalizing():

        async def rest() -> None:
            await client.close()
            loop.stop()

        asyncio.run_coroutine_threadsafe(rest(), loop)


def _requests(
    prompt: Any, sampling_params: Any, stream: bool, options: GenerateOptions
) -> tuple[list[GenerateRequest], bool]:
    """One request a prompt, and whether a single one was given rather than a list."""
    if unknown := options.keys() - GenerateOptions.__annotations__.keys():
        raise TypeError(f"generate() got unknown arguments: {', '.join(sorted(unknown))}")
    input_ids: Any = options.get("input_ids")
    if (prompt is None) == (input_ids is None):
        raise RequestError("give exactly one of prompt and input_ids", param="prompt")
    texts: list[str | None]
    ids: list[list[int] | None]
    if prompt is not None:
        single = isinstance(prompt, str)
        texts = [checked_text(text, "prompt") for text in ([prompt] if single else prompt)]
        ids = [None] * len(texts)
    else:
        single = bool(input_ids) and isinstance(input_ids[0], int)
        ids = [checked(list(each), list[Count], "input_ids") for each in ([input_ids] if single else input_ids)]
        texts = [None] * len(ids)

    def each(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list | tuple):
            return [value] * len(texts)
        if len(value) != len(texts):
            raise RequestError(
                f"{name} has {len(value)} entries for {len(texts)} prompts; give one each, or one for all", param=name
            )
        return list(value)

    rows = zip(
        texts,
        ids,
        each("sampling_params", sampling_params),
        each("return_logprob", options.get("return_logprob", False)),
        each("logprob_start_len", options.get("logprob_start_len")),
        each("top_logprobs_num", options.get("top_logprobs_num")),
        each("rid", options.get("rid")),
        each("lora_path", options.get("lora_path")),
        strict=True,
    )
    priority = checked(options.get("priority", 0), Priority, "priority")
    requests = [
        GenerateRequest(
            text=text,
            input_ids=of_ids,
            sampling=parse_sampling_params(params or {}),
            logprob=_logprob(start, top) if wanted else None,
            rid=None if rid is None else checked_text(rid, "rid"),
            priority=priority,
            adapter="" if adapter is None else checked_text(adapter, "lora_path"),
            stream=stream,
        )
        for text, of_ids, params, wanted, start, top, rid, adapter in rows
    ]
    return requests, single


def _logprob(start: Any, top: Any) -> LogprobParams:
    return LogprobParams(
        top_logprobs_num=checked(top or 0, Count, "top_logprobs_num"),
        logprob_start_len=checked(-1 if start is None else start, StartLen, "logprob_start_len"),
    )
