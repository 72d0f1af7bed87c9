"""POST /generate, with SGLang's answers: one object a prompt and answer; stream events carry everything so far."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from sglang_core.engine.native import finish_reason
from sglang_core.engine.requests import GenerateChunk, GenerateRequest
from sglang_core.server.answers import Answer, collect, prompt_only
from sglang_core.server.body import ignored_header, json_response, read_body
from sglang_core.server.disconnect import until_disconnect
from sglang_core.server.fan_in import fan_in
from sglang_core.server.logprobs import TokenTexts
from sglang_core.server.native_request import NativeRequest, NativeSampling
from sglang_core.server.openapi import doc
from sglang_core.server.serving import Serving
from sglang_core.server.sse import EventStream, event
from sglang_core.types import TokenLogprobs

Scored = tuple[float | None, int, str | None]  # logprob, token id, text


class MetaInfo(msgspec.Struct, kw_only=True):
    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
    input_token_logprobs: list[Scored] | UnsetType = UNSET
    output_token_logprobs: list[Scored] | UnsetType = UNSET
    input_top_logprobs: list[list[Scored] | None] | UnsetType = UNSET
    output_top_logprobs: list[list[Scored] | None] | UnsetType = UNSET


class NativeAnswer(msgspec.Struct, kw_only=True):
    """A request for a batch, or for n > 1, is answered by an array of these. `index` is in stream events of such."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET


class NativeReply:
    """Turns answers into SGLang's objects."""

    def __init__(self, requests: Sequence[GenerateRequest], with_text: bool, texts: TokenTexts) -> None:
        self.start = time.monotonic()
        self.requests, self.with_text, self.texts = requests, with_text, texts

    def one(self, which: int, answer: Answer, scored: Sequence[TokenLogprobs]) -> NativeAnswer:
        meta = MetaInfo(
            id=answer.rid,
            finish_reason=finish_reason(answer.finish_reason, answer.completion_tokens),
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=answer.cached_tokens,
            e2e_latency=time.monotonic() - self.start,
        )
        wanted = self.requests[which].logprob
        if wanted is not None:
            meta.input_token_logprobs = [self._own(token) for token in scored]
            meta.output_token_logprobs = [self._own(token) for token in answer.logprobs]
            if wanted.top_logprobs_num:
                meta.input_top_logprobs = [self._best(token, wanted.top_logprobs_num) for token in scored]
                meta.output_top_logprobs = [self._best(token, wanted.top_logprobs_num) for token in answer.logprobs]
        return NativeAnswer(text=answer.text, output_ids=answer.token_ids, meta_info=meta)

    def whole(self, answers: list[list[Answer]]) -> list[NativeAnswer]:
        out = []
        for which, of_prompt in enumerate(answers):
            scored = next((answer.input_logprobs for answer in of_prompt if answer.input_logprobs), [])
            out += [self.one(which, answer, scored) for answer in of_prompt]
        return out

    async def events(
        self, chunks: AsyncGenerator[tuple[int, GenerateChunk], None], indexed: bool
    ) -> AsyncGenerator[bytes, None]:
        """With SGLang's `index`: answers are numbered prompt by prompt."""
        seen = [[Answer() for _ in range(request.sampling.n)] for request in self.requests]
        firsts = [sum(len(answers) for answers in seen[:which]) for which in range(len(seen))]
        async with aclosing(chunks):
            async for which, chunk in chunks:
                answer = seen[which][chunk.index]
                answer.add(chunk)
                scored = next((a.input_logprobs for a in seen[which] if a.input_logprobs), [])
                out = self.one(which, answer, scored)
                if indexed:
                    out.index = firsts[which] + chunk.index
                yield event(out)

    def _own(self, token: TokenLogprobs) -> Scored:
        return token.logprob, token.token_id, self._text(token.token_id)

    def _best(self, token: TokenLogprobs, top: int) -> list[Scored] | None:
        if token.logprob is None:
            return None
        pairs = zip(token.top_logprobs[:top], token.top_ids[:top], strict=True)
        return [(logprob, i, self._text(i)) for logprob, i in pairs]

    def _text(self, token_id: int) -> str | None:
        return self.texts.bytes_of(token_id).decode("utf-8", "replace") if self.with_text else None


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["SGLang"])
    texts = TokenTexts(serving.client.tokenizer)

    @routes.post(
        "/generate", openapi_extra=doc(NativeRequest, NativeAnswer, events=NativeAnswer, parts=(NativeSampling,))
    )
    async def generate(request: Request) -> Response:
        """Go on with a prompt or a batch of them, SGLang's way."""
        body = await read_body(request, NativeRequest)
        requests, is_batch, ignored = await body.requests(serving.client)
        headers = ignored_header(body.ignored() + ignored)
        scores_only = body.scores_only()
        sources = []
        for i, asked in enumerate(requests):
            source = serving.generate(asked)
            none_wanted = scores_only[i] if isinstance(scores_only, list) else scores_only
            sources.append(prompt_only(source) if none_wanted else source)
        reply = NativeReply(requests, body.return_text_in_logprobs, texts)
        chunks = fan_in(sources)
        is_many = is_batch or requests[0].sampling.n > 1
        if body.stream:
            return EventStream(reply.events(chunks, is_many), headers)
        counts = [asked.sampling.n for asked in requests]
        answers = await until_disconnect(request.receive, collect(chunks, counts))
        whole = reply.whole(answers)
        return json_response(whole if is_many else whole[0], headers)

    return routes
