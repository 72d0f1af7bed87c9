"""POST /v1/chat/completions."""

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
from sglang_core.server.chat_messages import MESSAGES_SCHEMA, check_template_kwargs, read_messages, render
from sglang_core.server.disconnect import until_disconnect
from sglang_core.server.fan_in import fan_in
from sglang_core.server.limits import MAX_TOKENS, MAX_TOP_LOGPROBS
from sglang_core.server.logprobs import TokenTexts, chat_logprobs
from sglang_core.server.openai_request import REFUSED, OpenAIRequest, StreamOptions
from sglang_core.server.openai_types import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
    usage_of,
)
from sglang_core.server.openapi import doc
from sglang_core.server.prompts import check_batch, check_context
from sglang_core.server.serving import Serving, draw_rid
from sglang_core.server.sse import EventStream, event
from sglang_core.types import LogprobParams, TokenLogprobs

NO_TOOLS = "tool calls are not supported yet; leave it out or set tool_choice to 'none'"


class ChatRequest(OpenAIRequest):
    refused: ClassVar[dict[str, str]] = REFUSED | {
        "functions": NO_TOOLS,
        "function_call": NO_TOOLS,
        "audio": "audio is not supported; leave it out",
        "best_of": "best_of belongs to /v1/completions; use n",
    }

    messages: Annotated[Any, WithJsonSchema(MESSAGES_SCHEMA)]
    max_completion_tokens: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="the room left in the context by default"
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Any] | None = Field(None, description="only with tool_choice 'none'")
    tool_choice: Annotated[Any, WithJsonSchema({"const": "none"})] = None
    modalities: list[str] | None = Field(None, description="only ['text']")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="variables for the chat template")
    add_generation_prompt: bool | None = Field(None, description="true by default; false with continue_final_message")
    continue_final_message: bool = Field(False, description="the last message is an answer to go on with")

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check_chat(self) -> None:
        if (self.tools and self.tool_choice != "none") or self.tool_choice not in (None, "none"):
            param = "tools" if self.tools else "tool_choice"
            raise RequestError(f"{param}: {NO_TOOLS}", param=param, code="unsupported_parameter")
        if self.modalities not in (None, [], ["text"]):
            message = f"modalities={self.modalities!r} is not supported; allowed: ['text']"
            raise RequestError(message, param="modalities", code="unsupported_parameter")
        if self.top_logprobs is not None and not self.logprobs:
            message = f"top_logprobs={self.top_logprobs} needs logprobs=true"
            raise RequestError(message, param="top_logprobs", code="invalid_value")
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other; set one of them"
            raise RequestError(message, param="continue_final_message", code="invalid_value")
        check_template_kwargs(self.chat_template_kwargs)


class ChatReply:
    """Turns one request's chunks into OpenAI's objects."""

    def __init__(self, serving: Serving, body: ChatRequest, rid: str, texts: TokenTexts) -> None:
        self.rid, self.n = rid, body.n or 1
        self.model, self.created = body.model or serving.info.served_model_name, int(time.time())
        self.texts, self.top = texts, body.top_logprobs or 0
        self.wants_logprobs = body.logprobs
        self.options = body.stream_options or StreamOptions()

    def whole(self, answers: list[Answer]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=i,
                message=ChatMessage(content=answer.text),
                logprobs=self._logprobs(answer.logprobs),
                finish_reason=answer.finish_reason.type if answer.finish_reason else "abort",
                matched_stop=answer.finish_reason.matched if answer.finish_reason else None,
            )
            for i, answer in enumerate(answers)
        ]
        return ChatCompletion(
            id=self.rid, created=self.created, model=self.model, choices=choices, usage=usage_of([answers])
        )

    async def events(self, chunks: AsyncGenerator[tuple[int, GenerateChunk], None]) -> AsyncGenerator[bytes, None]:
        seen = [Answer() for _ in range(self.n)]
        started: set[int] = set()
        async with aclosing(chunks):
            async for _, chunk in chunks:
                seen[chunk.index].count(chunk)
                if chunk.index not in started:
                    started.add(chunk.index)
                    yield self._event(
                        ChatChunkChoice(index=chunk.index, delta=Delta(role="assistant", content="")), seen
                    )
                if chunk.text or chunk.finish_reason or (self.wants_logprobs and chunk.logprobs):
                    yield self._event(self._choice(chunk), seen)
        if self.options.include_usage:
            yield event(
                ChatChunk(id=self.rid, created=self.created, model=self.model, choices=[], usage=usage_of([seen]))
            )

    def _choice(self, chunk: GenerateChunk) -> ChatChunkChoice:
        choice = ChatChunkChoice(index=chunk.index, delta=Delta(content=chunk.text) if chunk.text else Delta())
        if self.wants_logprobs and chunk.logprobs:
            choice.logprobs = self._logprobs(chunk.logprobs)
        if chunk.finish_reason is not None:
            choice.finish_reason = chunk.finish_reason.type
            if chunk.finish_reason.matched is not None:
                choice.matched_stop = chunk.finish_reason.matched
        return choice

    def _event(self, choice: ChatChunkChoice, seen: list[Answer]) -> bytes:
        chunk = ChatChunk(id=self.rid, created=self.created, model=self.model, choices=[choice])
        if self.options.continuous_usage_stats:
            chunk.usage = usage_of([seen])
        elif self.options.include_usage:
            chunk.usage = None
        return event(chunk)

    def _logprobs(self, tokens: list[TokenLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(tokens, self.texts, self.top) if self.wants_logprobs else None


async def chat_request(serving: Serving, body: ChatRequest, rid: str) -> tuple[GenerateRequest, list[str]]:
    """The engine's request, and the names of ignored message fields. Raises RequestError."""
    info = serving.info
    adapter = body.adapter(info, serving.client.adapters)
    body.check_common()
    body.check_chat()
    messages, ignored = read_messages(body.messages)
    options: dict[str, Any] = dict(body.chat_template_kwargs)
    if body.continue_final_message:
        if messages[-1]["role"] != "assistant":
            message = "continue_final_message needs an assistant message at the end; add one or leave it out"
            raise RequestError(message, param="continue_final_message", code="invalid_value")
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    elif body.add_generation_prompt is False:
        options["add_generation_prompt"] = False
    ids = await render(serving.client, messages, **options)
    max_param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_new_tokens = check_context(info, len(ids), body.max_new_tokens, "messages", max_param)
    check_batch(info, 1, body.n or 1, "n")
    sampling = body.to_sampling(
        info,
        max_new_tokens=max(max_new_tokens, 1),
        min_new_tokens=body.min_tokens,
        min_param="min_tokens",
        defaults=info.generation_defaults,
        seed=body.seed,
    )
    return GenerateRequest(
        input_ids=ids,
        sampling=sampling,
        logprob=LogprobParams(top_logprobs_num=body.top_logprobs or 0) if body.logprobs else None,
        rid=rid,
        priority=body.priority,
        salt=body.cache_salt or "",
        adapter=adapter,
        stream=body.stream,
        add_special_tokens=False,
    ), ignored


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])
    texts = TokenTexts(serving.client.tokenizer)

    @routes.post("/v1/chat/completions", openapi_extra=doc(ChatRequest, ChatCompletion, events=ChatChunk))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, at once or as a stream of events."""
        body = await read_body(request, ChatRequest)
        rid = body.rid or draw_rid("chatcmpl-")
        asked, ignored = await chat_request(serving, body, rid)
        headers = ignored_header(body.ignored() + ignored) | {"X-Request-Id": rid}
        source = serving.generate(asked)
        if body.max_new_tokens == 0:
            source = prompt_only(source)
        chunks = fan_in([source])
        reply = ChatReply(serving, body, rid, texts)
        if body.stream:
            return EventStream(reply.events(chunks), headers)
        answers = await until_disconnect(request.receive, collect(chunks, [reply.n]))
        return json_response(reply.whole(answers[0]), headers)

    return routes
