"""`EngineClient`: the asyncio side of an engine. Tokenises, sends, turns tokens into text, ends what the caller leaves.

One loop owns a client. Per answer it keeps one `_Answer`, from `generate` until its terminal output came and was delivered. The
engine knows an answer by a key that is used once: what it still says about one that its reader left is nobody's, even where the
caller uses the rid again at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from sglang_core.config import EngineConfig
from sglang_core.engine.adapter_names import check_adapter_name, unknown_adapter
from sglang_core.engine.detokenizer import StopMatch, TextStream
from sglang_core.engine.link import open_link
from sglang_core.engine.requests import EngineInfo, GenerateChunk, GenerateRequest, Tokenizer
from sglang_core.engine.tokenizer import HFTokenizer
from sglang_core.errors import ConfigError, EngineDeadError, QueueFullError, RequestError
from sglang_core.types import (
    AbortReq,
    AdapterSource,
    AddReq,
    Control,
    ControlReply,
    EngineFailed,
    EngineReady,
    FinishReason,
    FinishReqAt,
    FromEngine,
    OutputBatch,
    ReqOutput,
    SamplingParams,
)

log = logging.getLogger(__name__)
GRACE_SECONDS = 5.0  # for an engine that was asked to shut down
WATCH_INTERVAL = 0.25  # seconds between two looks at the rank processes
TOKENIZE_IN_THREAD = 4096  # characters; shorter prompts are not worth the hand-over


@dataclass(eq=False, slots=True)
class _Answer:
    """One req in the engine: its text so far and what its reader has not taken yet."""

    rid: str  # as the caller knows it
    key: str  # as the engine knows it
    index: int
    num_prompt_tokens: int
    sampling: SamplingParams
    text: TextStream | None
    stream: bool
    every: int  # tokens between two chunks
    news: asyncio.Event
    chunks: list[GenerateChunk] = field(default_factory=list)
    unsent: int = 0
    num_tokens: int = 0
    done: bool = False
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        self.error, self.done = error, True
        self.news.set()


class EngineClient:
    """See `requests.Client`. Made by `start`; `close` ends the engine with it."""

    def __init__(self, config: EngineConfig, *, replica: int = 0) -> None:
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.info: EngineInfo
        self.adapters: dict[str, str] = {}  # LoRA adapters, name -> path
        self.gauges: dict[str, float] = {}  # the engine's latest
        self._answers: dict[str, _Answer] = {}  # by key
        self._groups: dict[str, list[_Answer]] = {}  # request rid -> its answers
        self._answer_ids = itertools.count()
        self._controls: dict[int, asyncio.Future[ControlReply]] = {}
        self._control_ids = itertools.count()
        self._ready: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(
            lambda ready: ready.cancelled() or ready.exception()
        )  # seen, even if nobody waits
        self._dead: EngineDeadError | None = None
        self._silence = 0.0  # seconds that the engine, once ready, has said nothing
        self._link = open_link(config, replica, self._on_message)
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, config: EngineConfig, *, replica: int = 0, tokenizer: asyncio.Task[Tokenizer | None] | None = None
    ) -> EngineClient:
        """Start the engine and wait until it is ready. Raises ConfigError and its siblings with the engine's own words.

        `tokenizer`: where several engines have one.
        """
        client = cls(config, replica=replica)
        try:
            client._link.start()
            client._watcher = asyncio.create_task(client._watch())
            loading = tokenizer or asyncio.create_task(asyncio.to_thread(load_tokenizer, config))  # beside the model
            ready = await asyncio.gather(asyncio.shield(client._ready), asyncio.shield(loading), return_exceptions=True)
            for outcome in ready:
                if isinstance(outcome, BaseException):
                    raise outcome
            facts, client.tokenizer = ready  # type: ignore[assignment]
            client.info = msgspec.convert(facts, EngineInfo)
            client.adapters = dict(client.info.adapters)
        except BaseException:
            await _to_its_end(client.close())
            raise
        return client

    @property
    def is_alive(self) -> bool:
        return self._dead is None and self._ready.done()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        """Stream one request; see `requests.Client.generate`."""
        self._raise_if_dead()
        input_ids = await self._input_ids(request)
        self._raise_if_dead()  # tokenising a long prompt takes its time
        self._check(request, input_ids)
        rid = request.rid or secrets.token_hex(12)
        if rid in self._groups:
            raise duplicate_rid(rid)
        news = asyncio.Event()
        answers = [self._answer(request, rid, index, len(input_ids), news) for index in range(request.sampling.n)]
        self._groups[rid] = answers
        try:
            for answer in answers:
                self._answers[answer.key] = answer
                self._link.send(self._message(request, answer, input_ids))
            while True:
                await news.wait()
                news.clear()
                for answer in answers if request.stream else [answer for answer in answers if answer.done]:
                    chunks, answer.chunks = answer.chunks, []
                    for chunk in chunks:
                        yield chunk
                for answer in answers:  # nothing awaits between this and the end: no error comes unseen
                    if answer.error is not None:
                        raise answer.error
                if all(answer.done and not answer.chunks for answer in answers):
                    return
        finally:
            self._forget(rid, answers)

    async def abort(self, rid: str) -> None:
        self._raise_if_dead()
        named = self._groups.get(rid) or [answer for answer in self._answers.values() if answer.rid == rid]
        for key in [answer.key for answer in named] if rid else [""]:
            self._link.send(AbortReq(key))

    async def flush_cache(self) -> bool:
        return (await self._control("flush_cache")).ok

    async def stats(self) -> dict[str, float]:
        reply = await self._control("stats")
        return {name: float(value) for name, value in reply.data.items() if isinstance(value, int | float)}

    async def load_lora_adapter(self, name: str, path: str, *, pinned: bool = False) -> None:
        """See `requests.Client`. Other requests go on meanwhile."""
        check_adapter_name(name)
        source = AdapterSource(name=name, path=path, pinned=pinned)
        _raise_refusal(await self._control("load_adapter", source))
        self.adapters[name] = path

    async def unload_lora_adapter(self, name: str) -> None:
        """See `requests.Client`."""
        path = self.adapters.pop(name, None)
        try:
            _raise_refusal(await self._control("unload_adapter", AdapterSource(name=name)))
        except RequestError:
            if path is not None:
                self.adapters[name] = path
            raise

    async def close(self) -> None:
        """Shut the engine down and wait for it. Running requests end with EngineDeadError. Safe to call twice."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        polite = self.is_alive
        if polite:
            self._link.send(Control(id=next(self._control_ids), action="shutdown"))
        self._die("the engine was shut down")
        await asyncio.to_thread(self._link.stop, GRACE_SECONDS if polite else 0.0)
        await self._link.closed()

    def kill(self) -> None:
        """`close` by force: at once, from any thread, waiting for nothing. For an owner that is gone."""
        self._link.kill()

    # Requests

    async def _input_ids(self, request: GenerateRequest) -> list[int]:
        if (request.text is None) == (request.input_ids is None):
            raise RequestError("give exactly one of text and input_ids", param="text")
        if request.input_ids is not None:
            return request.input_ids
        assert request.text is not None
        if self.tokenizer is None:
            raise RequestError("this server runs with --skip-tokenizer-init: send input_ids, not text", param="text")
        encode = self.tokenizer.encode
        if len(request.text) < TOKENIZE_IN_THREAD:
            return encode(request.text, add_special_tokens=request.add_special_tokens)
        return await asyncio.to_thread(encode, request.text, add_special_tokens=request.add_special_tokens)

    def _check(self, request: GenerateRequest, input_ids: list[int]) -> None:
        """What the engine would choke on; the server has checked the rest of the fields."""
        if not input_ids:
            raise RequestError("the prompt has no tokens; it needs at least one", param="prompt")
        if (low := min(input_ids)) < 0 or (high := max(input_ids)) >= self.info.vocab_size:
            bad = low if low < 0 else high
            raise RequestError(
                f"token id {bad} is not in the vocabulary [0, {self.info.vocab_size})", param="input_ids"
            )
        if request.adapter and request.adapter not in self.adapters:
            raise unknown_adapter(request.adapter, list(self.adapters))
        if request.sampling.n > (room := self.info.max_running_requests + self.info.max_queued_requests):
            raise RequestError(f"n={request.sampling.n} answers are more than this engine holds ({room})", param="n")
        if self.tokenizer is None and request.sampling.stop:
            raise RequestError(
                "stop strings need a tokenizer; this server runs with --skip-tokenizer-init", param="stop"
            )

    def _answer(self, request: GenerateRequest, rid: str, index: int, num_prompt: int, news: asyncio.Event) -> _Answer:
        text = TextStream(self.tokenizer, request.sampling) if self.tokenizer is not None else None
        name = rid if request.sampling.n == 1 else f"{rid}-{index}"
        return _Answer(
            rid=name,
            key=f"{name}@{next(self._answer_ids)}",
            index=index,
            num_prompt_tokens=num_prompt,
            sampling=request.sampling,
            text=text,
            stream=request.stream,
            every=self.config.server.stream_interval,
            news=news,
        )

    def _message(self, request: GenerateRequest, answer: _Answer, input_ids: list[int]) -> AddReq:
        sampling = request.sampling
        if sampling.n > 1:  # each answer is a req of its own; with a seed they still differ from each other
            seed = None if sampling.seed is None else sampling.seed + answer.index
            sampling = msgspec.structs.replace(sampling, n=1, seed=seed)
        return AddReq(
            rid=answer.key,
            input_ids=input_ids,
            sampling=sampling,
            logprob=request.logprob,
            salt=request.salt,
            priority=request.priority,
            adapter=request.adapter,
        )

    def _forget(self, rid: str, answers: list[_Answer]) -> None:
        """The reader is done or gone: abort what still runs."""
        self._groups.pop(rid, None)
        for answer in answers:
            sent = self._answers.pop(answer.key, None) is not None
            if sent and not answer.done and self._dead is None:
                self._link.send(AbortReq(answer.key))

    async def _control(self, action: Any, adapter: AdapterSource | None = None) -> ControlReply:
        self._raise_if_dead()
        control = Control(id=next(self._control_ids), action=action, adapter=adapter)
        future = self._controls[control.id] = asyncio.get_running_loop().create_future()
        self._link.send(control)
        try:
            reply: ControlReply = await future
            return reply
        finally:
            self._controls.pop(control.id, None)

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(str(self._dead))

    # News from the engine, on the loop

    def _on_message(self, message: FromEngine) -> None:
        self._silence = 0.0
        match message:
            case OutputBatch(outputs=outputs, stats=stats):
                self.gauges = stats
                for output in outputs:
                    if (answer := self._answers.get(output.rid)) is not None and not answer.done:
                        self._take_output(answer, output)
            case ControlReply(id=control_id):
                if (future := self._controls.get(control_id)) is not None and not future.done():
                    future.set_result(message)
            case EngineReady(info=info):
                if not self._ready.done():
                    self._ready.set_result(info)
            case EngineFailed(error=error):
                self._die(error)

    def _take_output(self, answer: _Answer, output: ReqOutput) -> None:
        """`_on_output`, where what goes wrong with one answer (a tokenizer that chokes) is that answer's end, not the reader's."""
        try:
            self._on_output(answer, output)
        except Exception as e:
            log.exception("rid %s: its output cannot be delivered", answer.rid)
            answer.fail(e)
            self._link.send(AbortReq(answer.key))

    def _on_output(self, answer: _Answer, output: ReqOutput) -> None:
        finish = output.finish_reason
        if finish is not None and finish.type == "abort" and finish.status is not None:
            answer.fail(_refusal(finish))
            return
        text, token_ids = "", output.token_ids
        answer.num_tokens += len(token_ids)
        if answer.text is not None:
            text, match = self._text(answer, token_ids, finish)
            if match is not None and not (
                finish is not None and finish.type == "stop" and finish.matched == match.matched
            ):
                dropped = answer.num_tokens - match.num_tokens
                answer.num_tokens = match.num_tokens
                token_ids = token_ids[: len(token_ids) - dropped] if dropped else token_ids
                if finish is None:
                    self._link.send(FinishReqAt(answer.key, match.num_tokens, match.matched))
                finish = FinishReason("stop", matched=match.matched)
        self._deliver(answer, output, text, token_ids, finish)

    def _text(self, answer: _Answer, token_ids: list[int], finish: FinishReason | None) -> tuple[str, StopMatch | None]:
        assert answer.text is not None
        trimmed = finish is not None and finish.type == "stop" and isinstance(finish.matched, int)
        shown = token_ids[:-1] if trimmed and not answer.sampling.no_stop_trim else token_ids
        text, match = answer.text.push(shown)
        if finish is not None and match is None:
            rest, match = answer.text.finish()
            text += rest
        return text, match

    def _deliver(
        self, answer: _Answer, output: ReqOutput, text: str, token_ids: list[int], finish: FinishReason | None
    ) -> None:
        chunk = GenerateChunk(
            rid=answer.rid,
            index=answer.index,
            text=text,
            token_ids=token_ids,
            logprobs=output.logprobs[: len(token_ids)],
            input_logprobs=output.input_logprobs,
            finish_reason=finish,
            prompt_tokens=answer.num_prompt_tokens,
            completion_tokens=answer.num_tokens,
            cached_tokens=output.num_cached_tokens,
        )
        answer.done = finish is not None
        answer.chunks = [_joined(answer.chunks[-1], chunk)] if answer.chunks else [chunk]
        answer.unsent += len(token_ids)
        if answer.done or (answer.stream and (answer.unsent >= answer.every or chunk.completion_tokens <= 1)):
            answer.unsent = 0
            answer.news.set()

    # Life and death

    async def _watch(self) -> None:
        """Notice a rank that died, or an engine that says nothing, and end what is left of it.

        A running engine speaks every half second, with work or without. Silence is counted in looks, not read off a clock: a client
        that was itself stopped for an hour has not looked.
        """
        limit = self.config.server.watchdog_timeout
        while self._dead is None:
            await asyncio.sleep(WATCH_INTERVAL)
            if (cause := self._link.dead()) is not None:
                await asyncio.sleep(WATCH_INTERVAL)  # its last words may still be on the way
                self._die(cause)
            elif self._ready.done():
                self._silence += WATCH_INTERVAL
                if self._silence > limit:
                    self._die(f"the engine said nothing for {limit} s (see --watchdog-timeout)")
        await asyncio.sleep(WATCH_INTERVAL)  # one that failed is still writing its log
        self._link.kill()

    def _die(self, cause: str) -> None:
        """Nothing more comes from the engine: everyone who waits is told, once."""
        if self._dead is not None:
            return
        self._dead = EngineDeadError(cause)
        if not self._ready.done():
            self._ready.set_exception(ConfigError(cause))
        for answer in self._answers.values():
            if not answer.done:
                answer.fail(EngineDeadError(cause))
        for future in self._controls.values():
            if not future.done():
                future.set_exception(EngineDeadError(cause))


def duplicate_rid(rid: str) -> RequestError:
    return RequestError(
        f"rid {rid!r} is running already; choose another or wait for it", param="rid", code="duplicate_rid"
    )


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer that the config names, None with --skip-tokenizer-init."""
    if config.model.skip_tokenizer_init:
        return None
    from sglang_core.weights.checkpoint import resolve_folder

    model = config.model
    path = resolve_folder(model.tokenizer_path or model.model_path, model.revision, weights=False)
    template = None
    if model.chat_template is not None:
        try:
            template = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(
                f"--chat-template {model.chat_template!r} cannot be read: {e}; give a file of Jinja text"
            ) from e
    return HFTokenizer(path, trust_remote_code=model.trust_remote_code, chat_template=template)


def _raise_refusal(reply: ControlReply) -> None:
    if reply.ok:
        return
    status, param = reply.data.get("status"), reply.data.get("param")
    error = QueueFullError(reply.message) if status == 429 else RequestError(reply.message)
    error.status = status if isinstance(status, int) else 400
    error.param = param if isinstance(param, str) else None
    raise error


def _refusal(finish: FinishReason) -> RequestError:
    message = finish.message or "the request was refused"
    if finish.status == 429:
        return QueueFullError(message)
    return RequestError(
        message, status=finish.status or 400, code="context_length_exceeded" if "context" in message else None
    )


def _joined(first: GenerateChunk, then: GenerateChunk) -> GenerateChunk:
    """Two chunks of one answer as one."""
    return GenerateChunk(
        rid=then.rid,
        index=then.index,
        text=first.text + then.text,
        token_ids=first.token_ids + then.token_ids,
        logprobs=first.logprobs + then.logprobs,
        input_logprobs=first.input_logprobs + then.input_logprobs,
        finish_reason=then.finish_reason,
        prompt_tokens=then.prompt_tokens,
        completion_tokens=then.completion_tokens,
        cached_tokens=max(first.cached_tokens, then.cached_tokens),
    )


async def _to_its_end(cleaning: Coroutine[object, object, None]) -> None:
    """Await it though cancelled meanwhile, as one of several engines is where two cannot start. A ZMQ context that is left open hangs whoever collects it."""
    task = asyncio.ensure_future(cleaning)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()
