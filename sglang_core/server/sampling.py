"""Sampling fields of a body -> SamplingParams. Bounds are in the fields; what needs the model is checked here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from sglang_core.engine.requests import EngineInfo
from sglang_core.errors import RequestError
from sglang_core.server.body import RequestBody, shown
from sglang_core.server.limits import (
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_N,
    MAX_PENALTY,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOKENS,
)
from sglang_core.types import SamplingParams

DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what generation_config.json may set
PLAIN = (
    *DEFAULTED,
    "frequency_penalty",
    "presence_penalty",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    "n",
)

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]


def _one_or_many(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class SamplingFields(RequestBody):
    """The fields that OpenAI's API and SGLang's `sampling_params` have in common. None means not given."""

    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE, description="0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="-1 or 0 is all")
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-MAX_PENALTY, le=MAX_PENALTY)
    presence_penalty: float | None = Field(None, ge=-MAX_PENALTY, le=MAX_PENALTY)
    repetition_penalty: float | None = Field(None, gt=0, le=MAX_PENALTY)
    logit_bias: dict[str, Bias] | None = Field(
        None, max_length=MAX_LOGIT_BIASES, description="token id (as a string) -> added to its logit"
    )
    stop: Annotated[
        list[StopText] | None,
        BeforeValidator(_one_or_many),
        WithJsonSchema(
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS}]}
        ),
    ] = Field(None, max_length=MAX_STOPS)
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = Field(None, description="keep the matched stop string or token in the text")
    n: int | None = Field(None, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=-MAX_SEED, lt=MAX_SEED)

    def to_sampling(
        self,
        info: EngineInfo,
        *,
        max_new_tokens: int,
        min_new_tokens: int,
        defaults: Mapping[str, Any],
        seed: int | None,
        min_param: str,
        where: str = "",
    ) -> SamplingParams:
        """Raises RequestError where a token id is outside the vocabulary or min exceeds max."""
        values: dict[str, Any] = {name: defaults[name] for name in DEFAULTED if defaults.get(name) is not None}
        values |= {name: value for name in PLAIN if (value := getattr(self, name)) is not None}
        if values.get("top_k") == 0:  # Hugging Face's spelling of "all"
            values["top_k"] = -1
        if min_new_tokens > max_new_tokens:
            message = f"{min_param}={min_new_tokens} is above the maximum of {max_new_tokens}; lower it or raise that"
            raise RequestError(message, param=min_param, code="invalid_value")
        check_token_ids(self.stop_token_ids or (), info.vocab_size, f"{where}stop_token_ids")
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            logit_bias=_logit_bias(self.logit_bias or {}, info.vocab_size, f"{where}logit_bias"),
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=None if seed is None else seed % MAX_SEED,
            **values,
        )


def check_token_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise RequestError(
            f"{param}: token id {shown(bad)} is not in the vocabulary; allowed: 0 to {vocab_size - 1}",
            param=param,
            code="invalid_token_id",
        )


def _logit_bias(biases: Mapping[str, float], vocab_size: int, param: str) -> dict[int, float]:
    bad = next((key for key in biases if not (key.isascii() and key.isdecimal() and len(key) < 10)), None)
    if bad is not None:
        message = f'{param}: key {shown(bad)} is not a token id; keys are ids as strings, such as "42"'
        raise RequestError(message, param=param, code="invalid_token_id")
    out = {int(key): float(value) for key, value in biases.items()}
    check_token_ids(out, vocab_size, param)
    return out
