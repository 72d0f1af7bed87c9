"""Prompts as clients write them -> token ids, checked against the vocabulary and the context length."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sglang_core.engine.requests import Client, EngineInfo
from sglang_core.errors import RequestError
from sglang_core.server.body import json_type, shown
from sglang_core.server.limits import MAX_ANSWERS, MAX_CHARS_PER_TOKEN
from sglang_core.server.sampling import check_token_ids

T = TypeVar("T")
TOKENIZE_IN_THREAD = 4096  # characters; shorter texts are not worth the hand-over
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: list[int]
    text: str | None = None  # as it came; None where ids came


async def read_prompts(client: Client, value: Any, param: str) -> tuple[list[Prompt], bool]:
    """A string, ids, or a list of either -> prompts, and whether it was a list of them. Raises RequestError."""
    if not isinstance(value, list):
        return [await _prompt(client, value, param)], False
    if value and type(value[0]) is int:
        return [_from_ids(client, value, param)], False
    if not value:
        raise RequestError(f"{param} is empty; give at least one token", param=param, code="empty_prompt")
    if len(value) > MAX_ANSWERS:
        message = f"{param} has {len(value)} prompts; allowed: {MAX_ANSWERS} a request; split the batch"
        raise RequestError(message, param=param, code="too_many_prompts")
    return [await _prompt(client, item, f"{param}[{i}]") for i, item in enumerate(value)], True


def prompt_text(client: Client, prompt: Prompt) -> str:
    """The prompt as text: as it came, or decoded."""
    if prompt.text is not None or client.tokenizer is None:
        return prompt.text or ""
    return client.tokenizer.decode(prompt.ids)


def check_batch(info: EngineInfo, num_prompts: int, n: int, param: str) -> None:
    """Refuse at once a body with more answers than the engine can ever hold, running and waiting together."""
    allowed = min(MAX_ANSWERS, info.max_running_requests + info.max_queued_requests)
    if num_prompts * n > allowed:
        raise RequestError(
            f"{num_prompts} prompts x n={n} are {num_prompts * n} requests; this server holds {allowed}; split them",
            param=param,
            code="too_many_requests_in_batch",
        )


def capacity(info: EngineInfo) -> int:
    """Tokens a request may hold, prompt and answer together."""
    return min(info.context_length, info.max_total_tokens)


def check_context(info: EngineInfo, prompt_len: int, max_new_tokens: int | None, param: str, max_param: str) -> int:
    """Tokens that may be generated: those asked for, or where None the room left. Raises RequestError with the numbers."""
    limit = capacity(info)
    asked = 1 if max_new_tokens is None else max_new_tokens
    if prompt_len + max(asked, 1) <= limit:
        return limit - prompt_len if max_new_tokens is None else max_new_tokens
    if prompt_len >= limit or max_new_tokens is None:
        numbers, way_out, blamed = f"the prompt has {prompt_len} and leaves no room for an answer", "shorten it", param
    else:
        total = prompt_len + max_new_tokens
        numbers = f"the prompt has {prompt_len} and {max_param} asks for {max_new_tokens}, {total} in all"
        way_out, blamed = f"shorten the prompt or set {max_param} to at most {limit - prompt_len}", max_param
    message = f"{_limit_of(info)} is {limit} tokens; {numbers}; {way_out}"
    raise RequestError(message, param=blamed, code="context_length_exceeded")


async def encode(client: Client, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
    """`text` as token ids. Raises RequestError where there is no tokenizer, no token, or far too many of them."""
    if client.tokenizer is None:
        message = f"{param}: this server runs without a tokenizer (--skip-tokenizer-init); send token ids"
        raise RequestError(message, param=param, code="no_tokenizer")
    if not text:
        raise RequestError(f"{param} is empty; give at least one token", param=param, code="empty_prompt")
    await check_text_length(client, text, param)
    ids = await beside_the_loop(len(text), client.tokenizer.encode, text, add_special_tokens=add_special_tokens)
    if not ids:
        raise RequestError(f"{param}={shown(text)} has no tokens; give at least one", param=param, code="empty_prompt")
    return ids


async def check_text_length(client: Client, text: str, param: str) -> None:
    """Refuse a text that is far too long by its beginning, in a fraction of the time that tokenising all of it takes."""
    limit = capacity(client.info)
    if client.tokenizer is None or len(text) <= limit * MAX_CHARS_PER_TOKEN:
        return
    head = text[: limit * MAX_CHARS_PER_TOKEN // 4]
    at_least = len(await beside_the_loop(len(head), client.tokenizer.encode, head, add_special_tokens=False))
    if at_least > limit + 8:  # where the text is cut, a few tokens may differ
        message = f"{_limit_of(client.info)} is {limit} tokens; {param} has more than {at_least}; shorten it"
        raise RequestError(message, param=param, code="context_length_exceeded")


async def beside_the_loop(num_chars: int, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `work`, in a thread where it has so much text to do that other clients' streams would stutter."""
    if num_chars < TOKENIZE_IN_THREAD:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


async def _prompt(client: Client, item: Any, param: str) -> Prompt:
    if isinstance(item, str):
        return Prompt(await encode(client, item, param), item)
    if isinstance(item, list):
        return _from_ids(client, item, param)
    raise _wrong_type(item, param)


def _from_ids(client: Client, ids: list[Any], param: str) -> Prompt:
    if not ids:
        raise RequestError(f"{param} is empty; give at least one token", param=param, code="empty_prompt")
    if set(map(type, ids)) != {int}:
        at = next(i for i, item in enumerate(ids) if type(item) is not int)
        raise _wrong_type(ids[at], f"{param}[{at}]")
    check_token_ids((min(ids), max(ids)), client.info.vocab_size, param)
    return Prompt(ids)


def _limit_of(info: EngineInfo) -> str:
    is_context = info.context_length <= info.max_total_tokens
    return "this model's maximum context length" if is_context else "the KV pool of this server (--max-total-tokens)"


def _wrong_type(value: Any, param: str) -> RequestError:
    return RequestError(
        f"{param}={shown(value)} is {json_type(value)}; give a string, token ids, or an array of either",
        param=param,
        code="invalid_type",
    )
