"""The request fields that chat and text completions share, and what is refused rather than ignored."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from pydantic import Field

from sglang_core.engine.adapter_names import unknown_adapter
from sglang_core.engine.requests import EngineInfo
from sglang_core.errors import RequestError
from sglang_core.server.body import RequestBody
from sglang_core.server.limits import MAX_ADAPTER_CHARS, MAX_PRIORITY, MAX_RID_CHARS, MAX_SALT_CHARS, MAX_TOKENS
from sglang_core.server.sampling import SamplingFields

NO_GRAMMAR = "constrained decoding is not supported yet; ask for the format in the prompt"
REFUSED = {
    "guided_json": NO_GRAMMAR,
    "guided_regex": NO_GRAMMAR,
    "guided_choice": NO_GRAMMAR,
    "guided_grammar": NO_GRAMMAR,
    "structured_outputs": NO_GRAMMAR,
    "json_schema": NO_GRAMMAR,
    "regex": NO_GRAMMAR,
    "ebnf": NO_GRAMMAR,
    "structural_tag": NO_GRAMMAR,
    "use_beam_search": "beam search is not supported; use n with a temperature",
    "truncate_prompt_tokens": "prompts are never truncated; shorten the prompt",
    "custom_logit_processor": "custom logit processors are not supported; use logit_bias",
}


class StreamOptions(RequestBody):
    include_usage: bool = Field(default=False, description="a last event with the usage")
    continuous_usage_stats: bool = Field(default=False, description="the usage so far in every event")


class ResponseFormat(RequestBody):
    type: str


class OpenAIRequest(SamplingFields):
    """What both endpoints take. Fields beyond OpenAI's are SGLang's and vLLM's, with the same meaning."""

    refused: ClassVar[dict[str, str]] = REFUSED

    model: str | None = Field(
        None, description="the served model name, 'name:adapter' or a LoRA adapter's own name; may be left out"
    )
    lora_path: str | None = Field(None, max_length=MAX_ADAPTER_CHARS, description="name of a LoRA adapter")
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    response_format: ResponseFormat | None = Field(None, description="only {'type': 'text'}")
    user: str | None = Field(None, description="accepted; changes nothing")
    rid: str | None = Field(
        None, min_length=1, max_length=MAX_RID_CHARS, pattern=r"^[!-~]+$", description="also the answer's id"
    )
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_salt: str | None = Field(
        None, max_length=MAX_SALT_CHARS, description="share cached prefixes within one salt only"
    )
    return_cached_tokens_details: bool = Field(
        False, description="usage always has prompt_tokens_details.cached_tokens"
    )

    def adapter(self, info: EngineInfo, adapters: Collection[str]) -> str:
        """The name of the LoRA adapter asked for, "" for none. Raises RequestError for what is not served: 404 by `model`."""
        named = "" if self.model is None else adapter_of(self.model, info.served_model_name, adapters)
        if self.lora_path is None or self.lora_path == named:
            return named
        if named:
            message = f"lora_path={self.lora_path!r} and model={self.model!r} name two adapters; give one of them"
            raise RequestError(message, param="lora_path", code="invalid_value")
        if self.lora_path not in adapters:
            raise unknown_adapter(self.lora_path, adapters)
        return self.lora_path

    def check_common(self) -> None:
        """Raises RequestError for fields that do not go together."""
        if self.response_format is not None and self.response_format.type != "text":
            message = f"response_format.type={self.response_format.type!r}: {NO_GRAMMAR}"
            raise RequestError(message, param="response_format", code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            message = "stream_options is allowed only with stream=true; set stream or leave stream_options out"
            raise RequestError(message, param="stream_options", code="invalid_value")


def adapter_of(model: str, served: str, adapters: Collection[str]) -> str:
    """The adapter that a model name means, "" for the model itself. Raises RequestError: 404 for what is not served."""
    if model == served:
        return ""
    name = model.removeprefix(f"{served}:")
    if name not in adapters:
        raise model_not_found(model, served, adapters)
    return name


def model_not_found(name: str, served: str, adapters: Collection[str]) -> RequestError:
    loaded = f", with an adapter as {served}:NAME ({', '.join(sorted(adapters))})," if adapters else ""
    message = f"model={name!r} is not served here; use {served!r}{loaded} or leave model out"
    return RequestError(message, param="model", code="model_not_found", status=404)
