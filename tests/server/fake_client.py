"""A `Client` with no engine: a byte tokenizer, canned answers, and faults on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from sglang_core.engine.adapter_names import unknown_adapter
from sglang_core.engine.detokenizer import TextStream
from sglang_core.engine.requests import EngineInfo, GenerateChunk, GenerateRequest, Tokenizer
from sglang_core.errors import EngineDeadError, QueueFullError, RequestError
from sglang_core.types import FinishReason, TokenLogprobs

EOS = 256
VOCAB_SIZE = 260
CONTEXT_LENGTH = 512
INFO = EngineInfo(
    model_path="/models/fake",
    served_model_name="fake/model",
    context_length=CONTEXT_LENGTH,
    vocab_size=VOCAB_SIZE,
    max_running_requests=8,
    max_queued_requests=32,
    max_total_tokens=100_000,
    page_size=16,
    dtype="float32",
    device="fake",
    architecture="FakeForCausalLM",
    eos_token_ids=(EOS,),
    generation_defaults={"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    settings={"model_path": "/models/fake", "port": 30000},
    version="0.0.0",
)


class ByteTokenizer:
    """A token a byte, and EOS. Its chat template is "role: content" lines."""

    has_template = True

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        out, run = "", b""
        for i in ids:
            if i < EOS:
                run += bytes([i])
            elif not skip_special_tokens:
                out, run = out + run.decode(errors="replace") + self.id_to_token(i), b""
        return out + run.decode(errors="replace")

    def chat_ids(self, messages: list[dict[str, Any]], **template_kwargs: Any) -> list[int]:
        if not self.has_template:
            raise RequestError("this model has no chat template; give one with --chat-template FILE", param="messages")
        if template_kwargs.get("explode"):
            raise ValueError("roles must alternate")
        text = "\n".join(f"{m['role']}: {m['content'] or ''}{m.get('tool_calls', '')}" for m in messages)
        if template_kwargs.get("add_generation_prompt", True):
            text += "\nassistant: "
        return self.encode(text)

    def id_to_token(self, token_id: int) -> str:
        return "<eos>" if token_id == EOS else f"<{token_id}>"

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else self.id_to_token(token_id).encode()


@dataclass
class FakeClient:
    """Answers Paris to France, else counts. Records what it was asked and what was given up."""

    info: EngineInfo = INFO
    tokenizer: Tokenizer | None = field(default_factory=ByteTokenizer)
    delay: float = 0.0  # seconds a token
    fail_after: int | None = None  # tokens before the engine dies under a request
    queue_full: bool = False
    refuse: FinishReason | None = None  # the engine's own abort
    answer: str | None = None
    alive: bool = True
    pinned: bool = False
    requests: list[GenerateRequest] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    flushed: int = 0
    closed: bool = False
    adapters: dict[str, str] = field(default_factory=dict)

    @property
    def is_alive(self) -> bool:
        return self.alive

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        if not self.alive:
            raise EngineDeadError("the engine process was killed")
        if self.queue_full:
            raise QueueFullError("32 requests wait already; retry later", retry_after=3)
        self.requests.append(request)
        ended = False
        try:
            async for chunk in self._chunks(request):
                yield chunk
            ended = True
        finally:
            if not ended:
                self.given_up.append(request.rid or "")

    async def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    async def flush_cache(self) -> bool:
        self.flushed += not self.pinned
        return not self.pinned

    async def stats(self) -> dict[str, float]:
        return {
            "running": 1,
            "waiting": 2,
            "token_usage": 0.25,
            "cache_hit_rate": 0.5,
            "fallbacks": 3,
            "retractions": 4,
            "requests": len(self.requests),
        }

    async def load_lora_adapter(self, name: str, path: str, *, pinned: bool = False) -> None:
        if "/broken" in path:
            raise RequestError(f"{path} has no adapter_config.json", param="lora_path")
        self.adapters[name] = path

    async def unload_lora_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise unknown_adapter(name, self.adapters)
        del self.adapters[name]

    async def close(self) -> None:
        self.closed, self.alive = True, False

    async def _chunks(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        answers = [self._answer(request, index) for index in range(request.sampling.n)]
        whole: dict[int, GenerateChunk] = {}
        step = 0
        while answers:
            await asyncio.sleep(self.delay)
            step += 1
            if self.fail_after is not None and step > self.fail_after:
                raise EngineDeadError("the engine process was killed")
            for answer in list(answers):
                chunk = next(answer)
                if request.stream:
                    yield chunk
                else:
                    whole[chunk.index] = chunk = _joined(whole.get(chunk.index), chunk)
                    if chunk.finish_reason is not None:
                        yield chunk
                if chunk.finish_reason is not None:
                    answers.remove(answer)

    def _answer(self, request: GenerateRequest, index: int) -> Iterator[GenerateChunk]:
        sampling, ids = request.sampling, request.input_ids
        assert ids is not None
        assert ids and len(ids) + sampling.max_new_tokens <= self.info.context_length
        rid = request.rid if sampling.n == 1 else f"{request.rid}-{index}"
        text = TextStream(self.tokenizer, sampling) if self.tokenizer else None
        inputs = []
        if request.logprob is not None and request.logprob.logprob_start_len >= 0:
            start = request.logprob.logprob_start_len
            inputs = [self._logprobs(request, i, first=at == 0) for at, i in enumerate(ids) if at >= start]
        for done, token_id in enumerate(self._tokens(ids, index, sampling.ignore_eos), 1):
            finish = self.refuse
            if {"", request.rid} & set(self.aborted):
                finish = FinishReason("abort")
            stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS,))}
            if finish is None and token_id in stops:
                finish = FinishReason("stop", matched=token_id)
            shown, match = text.push([token_id] if token_id < EOS else []) if text else ("", None)
            if match is not None:
                finish = FinishReason("stop", matched=match.matched)
            elif finish is None and done >= sampling.max_new_tokens:
                finish = FinishReason("length")
            if finish is not None and match is None and text:
                shown += text.finish()[0]
            yield GenerateChunk(
                rid=rid or "",
                index=index,
                text=shown,
                token_ids=[token_id],
                logprobs=[self._logprobs(request, token_id)] if request.logprob else [],
                input_logprobs=inputs if done == 1 else [],
                finish_reason=finish,
                prompt_tokens=len(ids),
                completion_tokens=done,
                cached_tokens=len(ids) // 2,
            )
            if finish is not None:
                return

    def _tokens(self, ids: list[int], index: int, endless: bool) -> Iterator[int]:
        prompt = bytes(i for i in ids if i < EOS).decode(errors="replace")
        answer = self.answer
        if answer is None:
            answer = "Paris is the capital of France." if "France" in prompt else f"One, two, three ({index})."
        while True:
            yield from answer.encode()
            if not endless:
                yield EOS

    def _logprobs(self, request: GenerateRequest, token_id: int, first: bool = False) -> TokenLogprobs:
        assert request.logprob is not None
        if first:
            return TokenLogprobs(token_id, None)
        top = [token_id, *(i for i in range(97, 97 + 26) if i != token_id)][: request.logprob.top_logprobs_num]
        return TokenLogprobs(token_id, -0.5, top, [-0.5 - i for i in range(len(top))])


def _joined(before: GenerateChunk | None, new: GenerateChunk) -> GenerateChunk:
    if before is None:
        return new
    return GenerateChunk(
        rid=new.rid,
        index=new.index,
        text=before.text + new.text,
        token_ids=before.token_ids + new.token_ids,
        logprobs=before.logprobs + new.logprobs,
        input_logprobs=before.input_logprobs + new.input_logprobs,
        finish_reason=new.finish_reason,
        prompt_tokens=new.prompt_tokens,
        completion_tokens=new.completion_tokens,
        cached_tokens=new.cached_tokens,
    )
