"""What a ready server prints: what it serves, where, and as its last line a command to try it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import msgspec

from sglang_core.config import ServerArgs
from sglang_core.engine.requests import EngineInfo

QUESTION = "What is the capital of France?"


def banner(info: EngineInfo, server: ServerArgs, url: str, stats: Mapping[str, float], has_chat: bool) -> str:
    replicas = info.settings.get("dp_size", 1)
    lines = [
        f"sglang-core {info.version}: {info.served_model_name} ({info.architecture}, {info.dtype}) on {info.device}",
        f"context {info.context_length:,} tokens, KV pool {info.max_total_tokens:,} tokens, "
        f"up to {info.max_running_requests} requests at once" + f", in each of {replicas} replicas" * (replicas > 1),
    ]
    if fallbacks := int(stats.get("fallbacks", 0)):
        lines.append(f"{fallbacks} ops fell back to another kernel; `sglang-core explain` says which and why")
    lines += [f"ready at {url}  (routes: {url}/docs)", curl(info, server, url, has_chat)]
    return "\n".join(lines)


def curl(info: EngineInfo, server: ServerArgs, url: str, has_chat: bool) -> str:
    """A copyable command. A key is never printed; the shell takes it from $API_KEY."""
    if has_chat:
        route = "/v1/chat/completions"
        body = {"model": info.served_model_name, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    else:
        route, body = "/generate", {"input_ids": [0, 1, 2], "sampling_params": {"max_new_tokens": 8}}
    key = ' -H "Authorization: Bearer $API_KEY"' if server.api_key else ""
    return f"curl {url}{route} -H 'Content-Type: application/json'{key} -d {shlex.quote(msgspec.json.encode(body).decode())}"
