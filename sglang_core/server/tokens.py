"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from sglang_core.engine.requests import Tokenizer
from sglang_core.errors import RequestError
from sglang_core.server.body import RequestBody, ignored_header, json_response, json_type, read_body, shown
from sglang_core.server.limits import MAX_ANSWERS, MAX_CHARS_PER_TOKEN
from sglang_core.server.openapi import doc
from sglang_core.server.prompts import beside_the_loop, capacity
from sglang_core.server.sampling import check_token_ids
from sglang_core.server.serving import Serving

TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
IDS = {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}}


class TokenizeRequest(RequestBody):
    model: str | None = None
    prompt: Annotated[Any, WithJsonSchema(TEXTS)]
    add_special_tokens: bool = True


class Tokenized(msgspec.Struct, kw_only=True):
    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: Annotated[Any, WithJsonSchema(IDS)]
    skip_special_tokens: bool = True


class Detokenized(msgspec.Struct, kw_only=True):
    text: str | list[str]


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["SGLang"])
    info = serving.info

    @routes.post("/tokenize", openapi_extra=doc(TokenizeRequest, Tokenized))
    async def tokenize(request: Request) -> Response:
        """Text, or a list of texts, to token ids."""
        body = await read_body(request, TokenizeRequest)
        tokenizer = _tokenizer(serving)
        texts = _many(body.prompt, str, "prompt", "a string or an array of strings")
        longest = capacity(info) * MAX_CHARS_PER_TOKEN
        if sum(map(len, texts)) > longest:
            message = f"prompt has more than {longest} characters, far beyond this model's context; split it"
            raise RequestError(message, param="prompt", code="context_length_exceeded")
        encode, special = tokenizer.encode, body.add_special_tokens
        ids: list[Any] = [await beside_the_loop(len(text), encode, text, add_special_tokens=special) for text in texts]
        counts = [len(one) for one in ids]
        single = isinstance(body.prompt, str)
        out = Tokenized(
            tokens=ids[0] if single else ids, count=counts[0] if single else counts, max_model_len=info.context_length
        )
        return json_response(out, ignored_header(body.ignored()))

    @routes.post("/detokenize", openapi_extra=doc(DetokenizeRequest, Detokenized))
    async def detokenize(request: Request) -> Response:
        """Token ids, or a list of such lists, to text."""
        body = await read_body(request, DetokenizeRequest)
        tokenizer = _tokenizer(serving)
        single = isinstance(body.tokens, list) and not (body.tokens and isinstance(body.tokens[0], list))
        many = _many([body.tokens] if single else body.tokens, list, "tokens", "token ids or an array of such arrays")
        for ids in many:
            bad = next((i for i in ids if type(i) is not int), None) if set(map(type, ids)) - {int} else None
            if bad is not None or None in ids:
                raise RequestError(
                    f"tokens: {shown(bad)} is {json_type(bad)}; give integers", param="tokens", code="invalid_type"
                )
            check_token_ids(ids, info.vocab_size, "tokens")
        texts = [tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens) for ids in many]
        return json_response(Detokenized(text=texts[0] if single else texts), ignored_header(body.ignored()))

    return routes


def _tokenizer(serving: Serving) -> Tokenizer:
    if serving.client.tokenizer is None:
        message = "this server runs without a tokenizer (--skip-tokenizer-init); restart it without that flag"
        raise RequestError(message, code="no_tokenizer")
    return serving.client.tokenizer


def _many(value: Any, kind: type, param: str, wanted: str) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, kind) for one in values):
        raise RequestError(
            f"{param}={shown(value)} is {json_type(value)}; give {wanted}", param=param, code="invalid_type"
        )
    if len(values) > MAX_ANSWERS:
        message = f"{param} has {len(values)} entries; allowed: {MAX_ANSWERS}; split it"
        raise RequestError(message, param=param, code="too_many_prompts")
    return values
