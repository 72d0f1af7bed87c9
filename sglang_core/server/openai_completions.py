"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from sglang_core.engine.requests import GenerateChunk, GenerateRequest
from sglang_core.errors import RequestError
from sglang_core.server.answers import Answer, collect, prompt_only
from sglang_core.server.body import ignored_header, json_response, read_body
from sglang_core.server.disconnect import until_disconnect
from sglang_core.server.fan_in import fan_in
from sglang_core.server.limits import MAX_N, MAX_TOP_LOGPROBS
from sglang_core.server.logprobs import CompletionLogprobsWriter, TokenTexts
from sglang_core.server.openai_request import REFUSED, OpenAIRequest, StreamOptions
from sglang_core.server.openai_types import Completion, CompletionChoice, usage_of
from sglang_core.server.openapi import doc
from sglang_core.server.prompts import PROMPT_SCHEMA, Prompt, check_batch, check_context, prompt_text, read_prompts
from sglang_core.server.serving import Serving, draw_rid
from sglang_core.server.sse import EventStream, event
from sglang_core.types import FinishReason, LogprobParams, TokenLogprobs

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(OpenAIRequest):
    refused: ClassVar[dict[str, str]] = REFUSED | {"suffix": "this model cannot fill in the middle; leave suffix out"}

    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = Field(False, description="the prompt comes before the answer, with its log-probabilities if asked")
    best_of: int | None = Field(None, ge=1, le=MAX_N, description="must equal n")

    def check_completion(self) -> None:
        if self.best_of not in (None, self.n or 1):
            message = f"best_of={self.best_of} with n={self.n or 1} is not supported; set best_of to n or leave it out"
            raise RequestError(message, param="best_of", code="unsupported_parameter")


class CompletionReply:
    """Turns the chunks of every prompt into OpenAI's objects. Answer `i` of prompt `p` is choice `p * n + i`."""

    def __init__(
        self, serving: Serving, body: CompletionRequest, rid: str, echoes: list[str | None], texts: TokenTexts
    ) -> None:
        self.rid, self.n = rid, body.n or 1
        self.echoes = echoes  # a prompt each, None where it is not echoed
        self.model, self.created = body.model or serving.info.served_model_name, int(time.time())
        self.texts, self.top = texts, body.logprobs
        self.options = body.stream_options or StreamOptions()

    def whole(self, answers: list[list[Answer]]) -> Completion:
        choices = []
        for which, of_prompt in enumerate(answers):
            scored = next((answer.input_logprobs for answer in of_prompt if answer.input_logprobs), [])
            for i, answer in enumerate(of_prompt):
                choice = CompletionChoice(index=which * self.n + i, text=(self.echoes[which] or "") + answer.text)
                _finish(choice, answer.finish_reason or FinishReason("abort"))
                if self.top is not None:
                    choice.logprobs = CompletionLogprobsWriter(self.texts, self.top or 0).write(
                        scored + answer.logprobs
                    )
                choices.append(choice)
        return Completion(id=self.rid, created=self.created, model=self.model, choices=choices, usage=usage_of(answers))

    async def events(self, chunks: AsyncGenerator[tuple[int, GenerateChunk], None]) -> AsyncGenerator[bytes, None]:
        seen = [[Answer() for _ in range(self.n)] for _ in self.echoes]
        scored: list[list[TokenLogprobs]] = [[] for _ in self.echoes]
        writers: dict[int, CompletionLogprobsWriter] = {}
        async with aclosing(chunks):
            async for which, chunk in chunks:
                seen[which][chunk.index].count(chunk)
                scored[which] = scored[which] or chunk.input_logprobs
                index = which * self.n + chunk.index
                choice, tokens = CompletionChoice(index=index, text=chunk.text), chunk.logprobs
                if index not in writers:
                    writers[index] = CompletionLogprobsWriter(self.texts, self.top or 0)
                    choice.text = (self.echoes[which] or "") + chunk.text
                    tokens = scored[which] + tokens
                if self.top is not None and tokens:
                    choice.logprobs = writers[index].write(tokens)
                if chunk.finish_reason is not None:
                    _finish(choice, chunk.finish_reason)
                if choice.text or choice.finish_reason or choice.logprobs:
                    yield self._event(choice, seen)
        if self.options.include_usage:
            yield event(
                Completion(id=self.rid, created=self.created, model=self.model, choices=[], usage=usage_of(seen))
            )

    def _event(self, choice: CompletionChoice, seen: list[list[Answer]]) -> bytes:
        chunk = Completion(id=self.rid, created=self.created, model=self.model, choices=[choice])
        if self.options.continuous_usage_stats:
            chunk.usage = usage_of(seen)
        elif self.options.include_usage:
            chunk.usage = None
        return event(chunk)


def _finish(choice: CompletionChoice, reason: FinishReason) -> None:
    choice.finish_reason = reason.type
    if reason.matched is not None:
        choice.matched_stop = reason.matched


async def completion_requests(
    serving: Serving, body: CompletionRequest, rid: str
) -> tuple[list[GenerateRequest], list[Prompt]]:
    """One engine request a prompt. Raises RequestError before any of them starts."""
    info = serving.info
    adapter = body.adapter(info, serving.client.adapters)
    body.check_common()
    body.check_completion()
    prompts, _ = await read_prompts(serving.client, body.prompt, "prompt")
    check_batch(info, len(prompts), body.n or 1, "prompt" if len(prompts) > 1 else "n")
    logprob = None
    if body.logprobs is not None:
        logprob = LogprobParams(top_logprobs_num=body.logprobs, logprob_start_len=0 if body.echo else -1)
    requests = []
    for i, prompt in enumerate(prompts):
        room = check_context(info, len(prompt.ids), body.max_tokens, "prompt", "max_tokens")
        max_new_tokens = min(room, DEFAULT_MAX_TOKENS) if body.max_tokens is None else room
        sampling = body.to_sampling(
            info,
            max_new_tokens=max(max_new_tokens, 1),
            min_new_tokens=body.min_tokens,
            min_param="min_tokens",
            defaults=info.generation_defaults,
            seed=body.seed,
        )
        requests.append(
            GenerateRequest(
                input_ids=prompt.ids,
                sampling=sampling,
                logprob=logprob,
                rid=rid if len(prompts) == 1 else f"{rid}-p{i}",
                priority=body.priority,
                salt=body.cache_salt or "",
                adapter=adapter,
                stream=body.stream,
            )
        )
    return requests, prompts


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])
    texts = TokenTexts(serving.client.tokenizer)

    @routes.post("/v1/completions", openapi_extra=doc(CompletionRequest, Completion, events=Completion))
    async def completions(request: Request) -> Response:
        """Go on with a prompt, at once or as a stream of events."""
        body = await read_body(request, CompletionRequest)
        rid = body.rid or draw_rid("cmpl-")
        requests, prompts = await completion_requests(serving, body, rid)
        headers = ignored_header(body.ignored()) | {"X-Request-Id": rid}
        sources = [serving.generate(asked, group=rid) for asked in requests]
        if body.max_tokens == 0:
            sources = [prompt_only(source) for source in sources]
        chunks = fan_in(sources)
        echoes = [prompt_text(serving.client, prompt) if body.echo else None for prompt in prompts]
        reply = CompletionReply(serving, body, rid, echoes, texts)
        if body.stream:
            return EventStream(reply.events(chunks), headers)
        answers = await until_disconnect(request.receive, collect(chunks, [reply.n] * len(prompts)))
        return json_response(reply.whole(answers), headers)

    return routes
