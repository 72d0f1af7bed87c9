"""What a caller of the engine gives and gets, one request at a time, whatever door it came through."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_core.types import FinishReason, LogprobParams, SamplingParams, TokenLogprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One prompt, `sampling.n` answers. Exactly one of `text` and `input_ids` is given."""

    text: str | None = None
    input_ids: list[int] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    logprob: LogprobParams | None = None
    rid: str | None = None  # drawn if None; with n > 1 answer i runs as "rid-i"
    priority: int = 0
    adapter: str = ""  # name of a LoRA adapter
    salt: str = ""  # requests share cached prefixes only within one salt
    stream: bool = True  # False: only the last chunk of each answer is delivered, with everything in it
    add_special_tokens: bool = True  # chat templates bring their own


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateChunk:
    """News of answer `index`: what is new since its chunk before. The last one has `finish_reason`."""

    rid: str
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of token_ids, if asked
    input_logprobs: list[TokenLogprobs] = field(default_factory=list)  # in the first chunk, if asked
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0  # so far
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """Facts of the running engine, fixed from ready to shutdown."""

    model_path: str
    served_model_name: str
    context_length: int
    vocab_size: int
    max_running_requests: int
    max_queued_requests: int
    max_total_tokens: int
    page_size: int
    dtype: str
    device: str
    architecture: str
    eos_token_ids: tuple[int, ...]
    generation_defaults: Mapping[str, Any]  # from generation_config.json: temperature, top_p, ...
    settings: Mapping[str, Any]  # the resolved config, flat, keys left out
    version: str
    adapters: Mapping[str, str] = field(default_factory=dict)  # LoRA adapters loaded at start: name -> path


class Tokenizer(Protocol):
    """A transformers tokenizer behind the calls that the engine and server make."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str: ...
    def chat_ids(self, messages: list[dict[str, Any]], **template_kwargs: Any) -> list[int]:
        """Render the chat template with the generation prompt. Raises RequestError where there is none or it refuses."""

    def id_to_token(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class Client(Protocol):
    """How server, CLI and `Engine` talk to a running engine. One asyncio loop owns a client."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def adapters(self) -> Mapping[str, str]:
        """LoRA adapters that requests may name now: name -> path."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        """Stream one request. Closing the iterator aborts it. Raises RequestError (bad request), QueueFullError,
        EngineDeadError; an error after the first chunk is raised from the iterator."""

    async def abort(self, rid: str) -> None:
        """Abort the request of that rid (each of its answers), "" for all. Unknown rids are ignored."""

    async def flush_cache(self) -> bool:
        """Empty the radix cache; False where running requests pin pages."""

    async def stats(self) -> dict[str, float]:
        """Gauges: running, waiting, token_usage, cache_hit_rate, ..."""

    async def load_lora_adapter(self, name: str, path: str, *, pinned: bool = False) -> None:
        """Serve an adapter, or other weights under a known name. Raises RequestError that says what does not fit."""

    async def unload_lora_adapter(self, name: str) -> None:
        """Take no more requests for it, and return once its last one has ended. Raises RequestError for unknown names."""

    @property
    def is_alive(self) -> bool: ...
    async def close(self) -> None: ...
    def kill(self) -> None:
        """`close` by force: at once, from any thread, waiting for nothing."""
