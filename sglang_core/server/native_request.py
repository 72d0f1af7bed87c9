"""The body of /generate: SGLang's field names, one prompt or a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from sglang_core.engine.adapter_names import unknown_adapter
from sglang_core.engine.requests import Client, EngineInfo, GenerateRequest
from sglang_core.errors import RequestError
from sglang_core.server.body import RequestBody, json_type, parse, shown
from sglang_core.server.limits import (
    MAX_ADAPTER_CHARS,
    MAX_N,
    MAX_PRIORITY,
    MAX_RID_CHARS,
    MAX_SALT_CHARS,
    MAX_SEED,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS_NATIVE,
)
from sglang_core.server.openai_request import NO_GRAMMAR
from sglang_core.server.prompts import Prompt, check_batch, check_context, read_prompts
from sglang_core.server.sampling import SamplingFields
from sglang_core.server.serving import draw_rid
from sglang_core.types import LogprobParams, SamplingParams

DEFAULT_MAX_NEW_TOKENS = 128  # SGLang's
NO_MEDIA = "this server takes text only; leave it out"


class NativeSampling(SamplingFields):
    """SGLang's `sampling_params`."""

    refused: ClassVar[dict[str, str]] = {
        "json_schema": NO_GRAMMAR,
        "regex": NO_GRAMMAR,
        "ebnf": NO_GRAMMAR,
        "structural_tag": NO_GRAMMAR,
        "stop_regex": "stop_regex is not supported; use stop",
        "custom_params": "custom logit processors are not supported; use logit_bias",
    }

    max_new_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    min_new_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    sampling_seed: int | None = Field(None, ge=-MAX_SEED, lt=MAX_SEED, description="the same as seed")


def _per_item(item: dict[str, Any], description: str) -> Any:
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item}], "description": description})


class NativeRequest(RequestBody):
    """Where a field may be a list, it has one entry a prompt."""

    refused: ClassVar[dict[str, str]] = {
        "image_data": NO_MEDIA,
        "video_data": NO_MEDIA,
        "audio_data": NO_MEDIA,
        "input_embeds": "input embeddings are not supported; send text or input_ids",
        "session_params": "sessions are not supported; shared prefixes are cached without them",
        "custom_logit_processor": "custom logit processors are not supported; use logit_bias",
        "token_ids_logprob": "log-probabilities of chosen ids are not supported; use top_logprobs_num",
        "return_hidden_states": "hidden states are not supported; leave it out",
    }

    text: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    ] = None
    input_ids: Annotated[
        Any,
        WithJsonSchema(
            {
                "type": "array",
                "items": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
            }
        ),
    ] = None
    sampling_params: Annotated[Any, _per_item({"$ref": "#/components/schemas/NativeSampling"}, "how to sample")] = None
    rid: Annotated[Any, _per_item({"type": "string"}, "name for /abort_request")] = None
    lora_path: Annotated[Any, _per_item({"type": ["string", "null"]}, "name of a LoRA adapter, null for none")] = None
    stream: bool = False
    return_logprob: Annotated[Any, _per_item({"type": "boolean"}, "log-probabilities in meta_info")] = False
    logprob_start_len: Annotated[
        Any, _per_item({"type": "integer"}, "first prompt position with log-probabilities; -1: answer only")
    ] = -1
    top_logprobs_num: Annotated[Any, _per_item({"type": "integer"}, "alternatives a position")] = 0
    return_text_in_logprobs: bool = Field(False, description="(logprob, id, text) rather than (logprob, id, null)")
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    extra_key: Annotated[str | None, BeforeValidator(lambda v: v)] = Field(
        None, max_length=MAX_SALT_CHARS, description="share cached prefixes within one key only"
    )

    async def requests(self, client: Client) -> tuple[list[GenerateRequest], bool, list[str]]:
        """One engine request a prompt, whether a batch was sent, and ignored sampling fields. Raises RequestError."""
        prompts, is_batch = await self._prompts(client)
        count = len(prompts)
        samplings, ignored = self._samplings(client.info, prompts, is_batch)
        check_batch(
            client.info,
            count,
            max(sampling.n for sampling in samplings),
            "text" if self.text is not None else "input_ids",
        )
        rids = self._rids(count, is_batch)
        adapters = self._adapters(client, count, is_batch)
        wanted = _spread(self.return_logprob, count, is_batch, "return_logprob", bool)
        starts = _spread(self.logprob_start_len, count, is_batch, "logprob_start_len", int)
        tops = _spread(self.top_logprobs_num, count, is_batch, "top_logprobs_num", int)
        requests = [
            GenerateRequest(
                input_ids=prompt.ids,
                sampling=samplings[i],
                logprob=_logprob(starts[i], tops[i], len(prompt.ids)) if wanted[i] else None,
                rid=rids[i],
                priority=self.priority,
                salt=self.extra_key or "",
                adapter=adapters[i],
                stream=self.stream,
            )
            for i, prompt in enumerate(prompts)
        ]
        return requests, is_batch, ignored

    def scores_only(self) -> list[bool] | bool:
        """Whether no new token is wanted: one answer for all prompts, or one each."""
        if isinstance(self.sampling_params, list):
            return [_asks_for_none(one) for one in self.sampling_params]
        return _asks_for_none(self.sampling_params)

    async def _prompts(self, client: Client) -> tuple[list[Prompt], bool]:
        if (self.text is None) == (self.input_ids is None):
            given = "neither was given" if self.text is None else "both were given"
            raise RequestError(f"give text or input_ids: {given}", param="text", code="missing_required_parameter")
        param, value = ("text", self.text) if self.text is not None else ("input_ids", self.input_ids)
        flat = value[0] if isinstance(value, list) and value else value
        if isinstance(flat, str) != (param == "text"):
            wanted = "a string or an array of strings" if param == "text" else "token ids or an array of them"
            raise RequestError(
                f"{param}={shown(value)} is {json_type(flat)}; give {wanted}", param=param, code="invalid_type"
            )
        return await read_prompts(client, value, param)

    def _samplings(
        self, info: EngineInfo, prompts: list[Prompt], is_batch: bool
    ) -> tuple[list[SamplingParams], list[str]]:
        param = "text" if self.text is not None else "input_ids"
        if isinstance(self.sampling_params, list):
            _check_length(self.sampling_params, len(prompts), is_batch, "sampling_params")
            fields = [
                parse(NativeSampling, {} if raw is None else raw, f"sampling_params[{i}]")
                for i, raw in enumerate(self.sampling_params)
            ]
        else:
            raw = {} if self.sampling_params is None else self.sampling_params
            fields = [parse(NativeSampling, raw, "sampling_params")] * len(prompts)
        samplings = []
        for prompt, one in zip(prompts, fields, strict=True):
            room = check_context(info, len(prompt.ids), one.max_new_tokens, param, "sampling_params.max_new_tokens")
            samplings.append(
                one.to_sampling(
                    info,
                    max_new_tokens=max(1, min(room, DEFAULT_MAX_NEW_TOKENS) if one.max_new_tokens is None else room),
                    min_new_tokens=one.min_new_tokens,
                    min_param="sampling_params.min_new_tokens",
                    defaults={},
                    seed=one.seed if one.sampling_seed is None else one.sampling_seed,
                    where="sampling_params.",
                )
            )
        ignored = {f"sampling_params.{name}" for one in fields[:MAX_N] for name in one.ignored()}
        return samplings, sorted(ignored)

    def _adapters(self, client: Client, count: int, is_batch: bool) -> list[str]:
        """The name of each prompt's adapter, "" for none."""
        if isinstance(self.lora_path, list):
            _check_length(self.lora_path, count, is_batch, "lora_path")
        names = self.lora_path if isinstance(self.lora_path, list) else [self.lora_path] * count
        for name in names:
            if name is not None and not isinstance(name, str):
                message = f"lora_path={shown(name)} is {json_type(name)}; give the name of an adapter, or null"
                raise RequestError(message, param="lora_path", code="invalid_type")
            if name and name not in client.adapters:
                raise unknown_adapter(name[:MAX_ADAPTER_CHARS], client.adapters)
        return [name or "" for name in names]

    def _rids(self, count: int, is_batch: bool) -> list[str]:
        if self.rid is None:
            return [draw_rid() for _ in range(count)]
        if isinstance(self.rid, str):
            rids = [f"{self.rid}_{i}" for i in range(count)] if is_batch else [self.rid]
        else:
            rids = _spread(self.rid, count, is_batch, "rid", str)
        bad = next(
            (r for r in rids if not (0 < len(r) <= MAX_RID_CHARS and r.isascii() and r.isprintable() and " " not in r)),
            None,
        )
        if bad is not None:
            message = f"rid={shown(bad)}: use 1 to {MAX_RID_CHARS} printable ASCII characters without spaces"
            raise RequestError(message, param="rid", code="invalid_value")
        if len(set(rids)) != len(rids):
            raise RequestError("rid: entries of one batch must differ", param="rid", code="duplicate_rid")
        return rids


def _asks_for_none(raw: Mapping[str, Any] | None) -> bool:
    return raw is not None and raw.get("max_new_tokens") == 0


def _logprob(start: int, top: int, prompt_len: int) -> LogprobParams:
    if not -1 <= start <= prompt_len:
        message = f"logprob_start_len={start} is not in the prompt; allowed: -1 (answer only) to {prompt_len}"
        raise RequestError(message, param="logprob_start_len", code="invalid_value")
    if not 0 <= top <= MAX_TOP_LOGPROBS_NATIVE:
        message = f"top_logprobs_num={shown(top)}: allowed: 0 to {MAX_TOP_LOGPROBS_NATIVE}"
        raise RequestError(message, param="top_logprobs_num", code="invalid_value")
    return LogprobParams(top_logprobs_num=top, logprob_start_len=-1 if start == prompt_len else start)


def _spread(value: Any, count: int, is_batch: bool, name: str, kind: type) -> list[Any]:
    """`value` once a prompt: repeated, or as the list it is."""
    if isinstance(value, list):
        _check_length(value, count, is_batch, name)
    values = value if isinstance(value, list) else [value] * count
    bad = next((v for v in values if type(v) is not kind), None)
    if bad is not None or None in values:
        raise RequestError(
            f"{name}={shown(bad)} is {json_type(bad)}; give {json_type(kind())}", param=name, code="invalid_type"
        )
    return values


def _check_length(values: list[Any], count: int, is_batch: bool, name: str) -> None:
    if not is_batch:
        raise RequestError(
            f"{name} is an array, but there is one prompt; give one value", param=name, code="invalid_type"
        )
    if len(values) != count:
        message = f"{name} has {len(values)} entries for {count} prompts; give one each, or one value for all"
        raise RequestError(message, param=name, code="invalid_value")
