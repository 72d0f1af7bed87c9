"""Check chat messages and bring them into the shape that chat templates read."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from sglang_core.engine.requests import Client
from sglang_core.errors import RequestError
from sglang_core.server.body import json_type, shown
from sglang_core.server.prompts import beside_the_loop, check_text_length

log = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool")
KNOWN = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
MAX_MESSAGES = 16384
# Arguments of the renderer, not variables of the template: a client must not reach them.
RESERVED_KWARGS = {
    "add_generation_prompt",
    "bos_token",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "eos_token",
    "max_length",
    "messages",
    "padding",
    "processor_kwargs",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "self",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}
MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        },
                    },
                    {"type": "null"},
                ]
            },
            "name": {"type": "string"},
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "tool_call_id": {"type": "string"},
        },
    },
}


def read_messages(raw: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages for the template, and the names of fields that were ignored. Raises RequestError."""
    if not isinstance(raw, list):
        raise _wrong("messages", raw, "give an array of messages")
    if not raw:
        raise RequestError("messages is empty; give at least one message", param="messages", code="empty_prompt")
    if len(raw) > MAX_MESSAGES:
        message = f"messages has {len(raw)} entries; allowed: {MAX_MESSAGES}; merge or drop some"
        raise RequestError(message, param="messages", code="too_many_messages")
    ignored = {
        f"messages[].{name}" for message in raw if isinstance(message, dict) for name in message if name not in KNOWN
    }
    return [_message(message, f"messages[{i}]") for i, message in enumerate(raw)], sorted(ignored)


def check_template_kwargs(kwargs: dict[str, Any]) -> None:
    taken = next((name for name in kwargs if name in RESERVED_KWARGS), None)
    if taken is not None:
        raise RequestError(
            f"chat_template_kwargs.{taken} is no variable of the template; use the request's own field or leave it out",
            param="chat_template_kwargs",
            code="invalid_value",
        )


async def render(client: Client, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
    """Token ids of the rendered chat. Raises RequestError where the template refuses."""
    if client.tokenizer is None:
        message = "this server runs without a tokenizer (--skip-tokenizer-init); use /generate with input_ids"
        raise RequestError(message, param="messages", code="no_tokenizer")
    for i, one in enumerate(messages):
        await check_text_length(client, one["content"] or "", f"messages[{i}].content")
    try:
        size = sum(len(one["content"] or "") for one in messages)
        ids = await beside_the_loop(size, client.tokenizer.chat_ids, messages, **kwargs)
    except RequestError:
        raise
    except Exception as exc:  # the template is the checkpoint's code, run on the client's data
        log.warning("chat template failed", exc_info=exc)
        message = f"the chat template refuses these messages: {type(exc).__name__}: {exc}"
        raise RequestError(message[:500], param="messages", code="chat_template_error") from exc
    if not ids:
        raise RequestError("messages render to no tokens; give some content", param="messages", code="empty_prompt")
    return ids


def _message(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _wrong(where, raw, "give an object with role and content")
    role = raw.get("role")
    if role not in ROLES:
        raise _wrong(f"{where}.role", role, f"allowed: {', '.join(ROLES)}")
    out: dict[str, Any] = {"role": "system" if role == "developer" else role}
    out["content"] = _content(raw.get("content"), f"{where}.content", optional=role == "assistant")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if raw.get(name) is not None:
            if not isinstance(raw[name], str):
                raise _wrong(f"{where}.{name}", raw[name], "give a string")
            out[name] = raw[name]
    if raw.get("tool_calls"):
        out["tool_calls"] = _tool_calls(raw["tool_calls"], f"{where}.tool_calls")
    elif out["content"] is None:
        raise RequestError(f"{where}.content is required", param=f"{where}.content", code="missing_required_parameter")
    return out


def _content(raw: Any, where: str, *, optional: bool) -> str | None:
    """Text parts are joined by line breaks, as templates take one string."""
    if isinstance(raw, str):
        return raw
    if raw is None:
        if optional:
            return None
        raise RequestError(f"{where} is required", param=where, code="missing_required_parameter")
    if not isinstance(raw, list):
        raise _wrong(where, raw, "give a string or an array of text parts")
    return "\n".join(_text_part(part, f"{where}[{i}]") for i, part in enumerate(raw))


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise _wrong(where, part, 'give {"type": "text", "text": "..."}')
    if part.get("type") != "text":
        message = f"{where}.type={shown(part.get('type'))} is not supported by this model; allowed: text"
        raise RequestError(message, param=f"{where}.type", code="unsupported_content")
    if not isinstance(part.get("text"), str):
        raise _wrong(f"{where}.text", part.get("text"), "give a string")
    return str(part["text"])


def _tool_calls(raw: Any, where: str) -> list[dict[str, Any]]:
    """Earlier calls, as templates want them: `arguments` is an object, where OpenAI's wire form is JSON in a string."""
    if not isinstance(raw, list):
        raise _wrong(where, raw, "give an array of calls")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(raw)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(where, call, 'give {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments) if arguments.strip() else {}
        except (msgspec.DecodeError, RecursionError) as exc:
            raise _wrong(f"{where}.function.arguments", arguments, f"it is not valid JSON: {exc}") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _wrong(where: str, value: Any, way_out: str) -> RequestError:
    kind = "" if isinstance(value, str) else f" is {json_type(value)}"
    return RequestError(f"{where}={shown(value)}{kind}; {way_out}", param=where, code="invalid_value")
