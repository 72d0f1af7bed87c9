"""The three routes a request can take: what each sends, and how each streams its answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from sglang_core.bench.workload import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """What one event of a stream says. None is unsaid."""

    has_tokens: bool = False
    output_tokens: int | None = None  # so far
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    error: str | None = None


class Route(Protocol):
    path: str

    def body(self, prompt: Prompt, model: str, temperature: float) -> dict[str, Any]: ...
    def read(self, event: Mapping[str, Any]) -> News: ...


class Completions:
    """OpenAI's /v1/completions; ids go as ids."""

    path = "/v1/completions"

    def body(self, prompt: Prompt, model: str, temperature: float) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": prompt.input_ids if prompt.input_ids is not None else prompt.text,
            **_openai_options(prompt, temperature),
        }

    def read(self, event: Mapping[str, Any]) -> News:
        choices = event.get("choices") or ()
        # A token may have no text of its own yet (half a character); only an empty last event brings none.
        return _openai_news(event, any(c.get("text") or not c.get("finish_reason") for c in choices))


class ChatCompletions:
    """OpenAI's /v1/chat/completions; ids go as made-up words, so prompt lengths are what the server counts."""

    path = "/v1/chat/completions"

    def body(self, prompt: Prompt, model: str, temperature: float) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt.as_words()}]
        return {"model": model, "messages": messages, **_openai_options(prompt, temperature)}

    def read(self, event: Mapping[str, Any]) -> News:
        deltas = [(c.get("delta") or {}, c.get("finish_reason")) for c in event.get("choices") or ()]
        return _openai_news(event, any(_chat_tokens(delta, finish) for delta, finish in deltas))


class Generate:
    """SGLang's own /generate, whose events count their tokens."""

    path = "/generate"

    def body(self, prompt: Prompt, model: str, temperature: float) -> dict[str, Any]:
        asked = {"input_ids": prompt.input_ids} if prompt.input_ids is not None else {"text": prompt.text}
        sampling = {"max_new_tokens": prompt.output_len, "temperature": temperature, "ignore_eos": True}
        return {**asked, "sampling_params": sampling, "stream": True}

    def read(self, event: Mapping[str, Any]) -> News:
        if "error" in event:
            return News(error=_error_text(event["error"]))
        meta = event.get("meta_info") or {}
        return News(
            has_tokens=True,
            output_tokens=meta.get("completion_tokens"),
            prompt_tokens=meta.get("prompt_tokens"),
            cached_tokens=meta.get("cached_tokens"),
        )


ROUTES: Mapping[str, type[Route]] = {"completions": Completions, "chat": ChatCompletions, "generate": Generate}


def _openai_options(prompt: Prompt, temperature: float) -> dict[str, Any]:
    return {
        "max_tokens": prompt.output_len,
        "temperature": temperature,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _chat_tokens(delta: Mapping[str, Any], finish_reason: str | None) -> bool:
    if delta.get("content") or delta.get("reasoning_content"):
        return True
    return "role" not in delta and not finish_reason  # the first event may bring the role alone


def _openai_news(event: Mapping[str, Any], has_tokens: bool) -> News:
    if "error" in event:
        return News(error=_error_text(event["error"]))
    usage = event.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return News(
        has_tokens=has_tokens,
        output_tokens=usage.get("completion_tokens"),
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=details.get("cached_tokens"),
    )


def _error_text(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, Mapping) else str(error)


async def server_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each `data:` line of a server-sent event stream, but [DONE]."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                continue  # the end of the body follows; reading it lets the connection be used again
            yield msgspec.json.decode(data)
