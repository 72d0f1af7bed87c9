"""Chunks of one answer, put together."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from sglang_core.engine.requests import GenerateChunk
from sglang_core.types import FinishReason, TokenLogprobs


@dataclass(slots=True)
class Answer:
    """One of a prompt's `n` answers as far as it has come."""

    rid: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    input_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def count(self, chunk: GenerateChunk) -> None:
        self.prompt_tokens = chunk.prompt_tokens or self.prompt_tokens
        self.completion_tokens = chunk.completion_tokens
        self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)

    def add(self, chunk: GenerateChunk) -> None:
        self.count(chunk)
        self.rid = chunk.rid
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.input_logprobs += chunk.input_logprobs
        self.finish_reason = chunk.finish_reason


async def collect(chunks: AsyncGenerator[tuple[int, GenerateChunk], None], counts: list[int]) -> list[list[Answer]]:
    """Every answer, `[prompt][answer]`, once all have ended; `counts[p]` answers of prompt p."""
    answers = [[Answer() for _ in range(n)] for n in counts]
    async with aclosing(chunks):
        async for which, chunk in chunks:
            answers[which][chunk.index].add(chunk)
    return answers


async def prompt_only(source: AsyncGenerator[GenerateChunk, None]) -> AsyncGenerator[GenerateChunk, None]:
    """A request for no new tokens, to score its prompt: the engine samples one, which is dropped here."""
    scored: dict[int, list[TokenLogprobs]] = {}
    async with aclosing(source):
        async for chunk in source:
            scored.setdefault(chunk.index, []).extend(chunk.input_logprobs)
            if chunk.finish_reason is None:
                continue
            ended = chunk.finish_reason if chunk.finish_reason.type == "abort" else FinishReason("length")
            yield replace(
                chunk,
                text="",
                token_ids=[],
                logprobs=[],
                input_logprobs=scored[chunk.index],
                finish_reason=ended,
                completion_tokens=0,
            )
