"""Read a request body: size limit, JSON, schema. What is wrong with it is a RequestError that says what to change."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request
from starlette.responses import Response

from sglang_core.errors import RequestError

MAX_BODY_BYTES = 64 << 20
MAX_SHOWN = 80  # characters of a refused value that are quoted
MAX_SHOWN_ITEMS = 8
MAX_NAMED = 32  # ignored parameters named in the header
EMPTY: tuple[Any, ...] = (None, False, "", [], {})
SCHEMA_WORDS = {"str", "int", "float", "list", "dict", "bool"}


class RequestBody(BaseModel):
    """A JSON object. A null field counts as absent; an unknown one is kept apart and named in X-Ignored-Params."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())
    refused: ClassVar[
        Mapping[str, str]
    ] = {}  # fields that would change the answer but are not supported -> why, what instead

    def ignored(self) -> list[str]:
        names = list(self.model_extra or {})
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, RequestBody):
                names += [f"{name}.{inner}" for inner in value.ignored()]
        return names


Schema = TypeVar("Schema", bound=RequestBody)


async def read_body(request: Request, schema: type[Schema]) -> Schema:
    """The request's JSON object as `schema`. Raises RequestError: 400, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise RequestError(
            f"Content-Type {kind!r} is not supported; send JSON with -H 'Content-Type: application/json'",
            code="unsupported_media_type",
            status=415,
        )
    return parse(schema, decode(await _limited(request)))


def decode(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RequestError(f"the body is not valid JSON in UTF-8: {exc}", code="invalid_json") from None


def parse(schema: type[Schema], raw: Any, where: str = "") -> Schema:
    """`raw` checked against `schema`; `where` prefixes the parameter names in errors."""
    if not isinstance(raw, dict):
        what = f"{where}={shown(raw)}" if where else "the body"
        raise RequestError(
            f"{what} must be a JSON object, not {json_type(raw)}", param=where or None, code="invalid_type"
        )
    given = {name: value for name, value in raw.items() if value is not None}
    for name, reason in schema.refused.items():
        if name in given and given[name] not in EMPTY:
            param = _join(where, name)
            raise RequestError(f"{param}={shown(given[name])}: {reason}", param=param, code="unsupported_parameter")
    try:
        return schema.model_validate(given)
    except ValidationError as exc:
        raise _refusal(schema, exc.errors(include_url=False)[0], where) from None


def ignored_header(names: list[str]) -> dict[str, str]:
    """X-Ignored-Params, in printable ASCII whatever the client called its fields."""
    if not names:
        return {}
    safe = [re.sub(r"[^\x21-\x2b\x2d-\x7e]", "?", name[:MAX_SHOWN]) for name in names[:MAX_NAMED]]
    return {"X-Ignored-Params": ", ".join(safe) + (", ..." if len(names) > MAX_NAMED else "")}


def json_response(payload: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(msgspec.json.encode(payload), status, headers, media_type="application/json")


def shown(value: Any, depth: int = 2) -> str:
    """`value` as JSON, cut short, for an error message."""
    if isinstance(value, str):
        return json.dumps(value[:MAX_SHOWN], ensure_ascii=False) + ("..." if len(value) > MAX_SHOWN else "")
    if isinstance(value, (list, dict)):
        if depth == 0 or len(value) > MAX_SHOWN_ITEMS:
            return f"[... {len(value)} items]" if isinstance(value, list) else f"{{... {len(value)} fields}}"
        if isinstance(value, list):
            return f"[{', '.join(shown(item, depth - 1) for item in value)}]"
        return f"{{{', '.join(f'{shown(k)}: {shown(v, depth - 1)}' for k, v in value.items())}}}"
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    return json.dumps(value)


def json_type(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "an array",
    }
    return names.get(type(value), "an object")


async def _limited(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    chunks, total = [], int(declared) if declared.isdecimal() else 0
    if total <= MAX_BODY_BYTES:
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
            if total > MAX_BODY_BYTES:
                break
            chunks.append(chunk)
    if total > MAX_BODY_BYTES:
        raise RequestError(
            f"the body has more than {MAX_BODY_BYTES} bytes; split the batch into several requests",
            code="body_too_large",
            status=413,
        )
    return b"".join(chunks)


def _refusal(schema: type[RequestBody], error: ErrorDetails, where: str) -> RequestError:
    param = where
    for part in error["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part not in SCHEMA_WORDS:
            param = _join(param, part)
    if error["type"] == "missing":
        return RequestError(f"{param} is required", param=param, code="missing_required_parameter")
    message = error["msg"].removeprefix("Value error, ")
    message = f"{param}={shown(error['input'])}: {message[0].lower()}{message[1:]}"
    bounds = _bounds(schema, str(error["loc"][0])) if len(error["loc"]) == 1 else ""
    return RequestError(message + bounds, param=param, code="invalid_value")


def _bounds(schema: type[RequestBody], field: str) -> str:
    spec = schema.model_fields.get(field)
    if spec is None:
        return ""
    limits: dict[str, Any] = {}
    for meta in spec.metadata:
        for name in ("ge", "gt", "le", "lt"):
            limits |= {name: getattr(meta, name)} if hasattr(meta, name) else {}
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    allowed = "allowed: " + " and ".join(f"{words[k]} {v}" for k, v in limits.items()) if limits else ""
    way_out = "" if spec.is_required() else "leave it out for the default"
    return f" ({'; '.join(filter(None, (allowed, way_out)))})" if allowed or way_out else ""


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
