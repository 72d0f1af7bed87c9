"""SGLang's native shapes: sampling parameters as a plain dict, and an answer as {"text", "output_ids", "meta_info"}."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from sglang_core.engine.requests import GenerateChunk, GenerateRequest
from sglang_core.errors import RequestError
from sglang_core.types import FinishReason, SamplingParams, TokenLogprobs

ALIASES = {"sampling_seed": "seed", "max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
MAX_INT = 2**31 - 1  # what the runner keeps of a req is int32
SEEDS = 2**63  # what the wire carries; the runner folds a seed anyway
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]
Priority = Annotated[int, msgspec.Meta(ge=-MAX_INT, le=MAX_INT)]
StartLen = Annotated[int, msgspec.Meta(ge=-1, le=MAX_INT)]
# name -> (lowest, highest); None is open
BOUNDS: Mapping[str, tuple[float | None, float | None]] = {
    "max_new_tokens": (0, MAX_INT),
    "min_new_tokens": (0, MAX_INT),
    "temperature": (0, None),
    "top_p": (0, 1),
    "top_k": (-1, MAX_INT),
    "min_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "repetition_penalty": (1e-6, None),
    "n": (1, None),
}


def checked(value: Any, kind: Any, param: str) -> Any:
    """`value`, which came from a caller of any kind, if it is a `kind`. Raises RequestError that names `param`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise RequestError(f"{param}: {e}", param=param) from e


def checked_text(text: Any, param: str) -> str:
    """Raises RequestError for what is no text, or for half of a surrogate pair, which no tokenizer and no wire takes."""
    if not isinstance(text, str):
        raise RequestError(f"{param}: {text!r} is not a string", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RequestError(f"{param} is no text that UTF-8 can write: {e}", param=param) from e
    return text


def parse_sampling_params(params: Mapping[str, Any]) -> SamplingParams:
    """Raises RequestError that names the field, the value met and what is allowed."""
    if not isinstance(params, Mapping):
        raise RequestError(f"sampling_params={params!r} must be a dict", param="sampling_params")
    fields = {ALIASES.get(name, name): value for name, value in params.items() if value is not None}
    known = SamplingParams.__struct_fields__
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise RequestError(f"unknown sampling parameter {name!r}{hint}", param=name)
    if isinstance(fields.get("stop"), str):
        fields["stop"] = (fields["stop"],)
    if isinstance(fields.get("logit_bias"), Mapping):  # JSON has string keys only
        fields["logit_bias"] = _by_token_id(fields["logit_bias"])
    if isinstance(fields.get("seed"), int):
        fields["seed"] %= SEEDS
    sampling: SamplingParams = checked(fields, SamplingParams, "sampling_params")
    for name, (low, high) in BOUNDS.items():
        value = getattr(sampling, name)
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"between {low} and {high}"
            raise RequestError(f"{name}={value} must be {allowed}", param=name)
    for name, ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias)):
        if (bad := next((i for i in ids if not 0 <= i <= MAX_INT), None)) is not None:
            raise RequestError(f"{name}: {bad} is not a token id", param=name)
    if (bias := next((b for b in sampling.logit_bias.values() if not math.isfinite(b)), None)) is not None:
        raise RequestError(f"logit_bias: {bias} is not finite; to forbid a token take -1e9", param="logit_bias")
    if sampling.top_p == 0:
        raise RequestError("top_p=0 would leave no token; for greedy output set temperature=0", param="top_p")
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise RequestError(
            f"min_new_tokens={sampling.min_new_tokens} is above max_new_tokens={sampling.max_new_tokens}",
            param="min_new_tokens",
        )
    if any(not checked_text(stop, "stop") for stop in sampling.stop):
        raise RequestError("stop strings must not be empty", param="stop")
    return sampling


def answer(
    chunks: Sequence[GenerateChunk],
    request: GenerateRequest,
    seconds: float,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """All chunks of one answer so far as SGLang gives them. `token_text` puts each token's text into the logprobs."""
    last = chunks[-1]
    meta: dict[str, Any] = {
        "id": last.rid,
        "finish_reason": finish_reason(last.finish_reason, last.completion_tokens),
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "cached_tokens": max(chunk.cached_tokens for chunk in chunks),
        "e2e_latency": seconds,
    }
    if request.logprob is not None:
        inputs = [entry for chunk in chunks for entry in chunk.input_logprobs]
        outputs = [entry for chunk in chunks for entry in chunk.logprobs]
        meta["input_token_logprobs"] = [_own(entry, token_text) for entry in inputs]
        meta["output_token_logprobs"] = [_own(entry, token_text) for entry in outputs]
        if request.logprob.top_logprobs_num:
            meta["input_top_logprobs"] = [_top(entry, token_text) for entry in inputs]
            meta["output_top_logprobs"] = [_top(entry, token_text) for entry in outputs]
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "output_ids": [token_id for chunk in chunks for token_id in chunk.token_ids],
        "meta_info": meta,
    }


def finish_reason(reason: FinishReason | None, completion_tokens: int) -> dict[str, Any] | None:
    if reason is None:
        return None
    match reason.type:
        case "stop":
            return {"type": "stop", "matched": reason.matched}
        case "length":
            return {"type": "length", "length": completion_tokens}
        case "abort":
            return {"type": "abort", "message": reason.message}


def _own(entry: TokenLogprobs, text: Callable[[int], str] | None) -> tuple[float | None, int, str | None]:
    return entry.logprob, entry.token_id, text(entry.token_id) if text else None


def _top(entry: TokenLogprobs, text: Callable[[int], str] | None) -> list[tuple[float, int, str | None]] | None:
    if entry.logprob is None:  # the first prompt token: nothing predicted it
        return None
    return [(p, i, text(i) if text else None) for p, i in zip(entry.top_logprobs, entry.top_ids, strict=True)]


def _by_token_id(bias: Mapping[Any, Any]) -> dict[int, Any]:
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except (TypeError, ValueError) as e:
        raise RequestError(f"logit_bias keys must be token ids: {e}", param="logit_bias") from e
