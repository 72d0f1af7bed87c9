"""GET /model_info and /server_info, with the names they had before."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sglang_core.errors import SglangError
from sglang_core.server.body import json_response
from sglang_core.server.limits import STATS_TIMEOUT
from sglang_core.server.openapi import doc
from sglang_core.server.serving import Serving


class ModelInfo(msgspec.Struct, kw_only=True):
    model_path: str
    served_model_name: str
    architecture: str
    dtype: str
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, Any]
    is_generation: bool
    has_tokenizer: bool


class ServerInfo(msgspec.Struct, kw_only=True):
    """`settings` is shown to administrators only."""

    version: str
    status: str
    uptime: float  # seconds
    device: str
    page_size: int
    max_total_tokens: int
    max_running_requests: int
    max_queued_requests: int
    stats: dict[str, float]
    settings: dict[str, Any] | None = None


async def engine_stats(serving: Serving) -> dict[str, float]:
    """The engine's gauges; empty where it does not answer in time."""
    if not serving.client.is_alive:
        return {}
    try:
        return await asyncio.wait_for(serving.client.stats(), STATS_TIMEOUT)
    except (TimeoutError, SglangError):
        return {}


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["SGLang"])
    started = time.monotonic()
    info = serving.info

    @routes.get("/get_model_info", include_in_schema=False)
    @routes.get("/model_info", openapi_extra=doc(None, ModelInfo))
    async def model_info() -> Response:
        """Facts of the model."""
        return json_response(
            ModelInfo(
                model_path=info.model_path,
                served_model_name=info.served_model_name,
                architecture=info.architecture,
                dtype=info.dtype,
                context_length=info.context_length,
                vocab_size=info.vocab_size,
                eos_token_ids=info.eos_token_ids,
                generation_defaults=dict(info.generation_defaults),
                is_generation=True,
                has_tokenizer=serving.client.tokenizer is not None,
            )
        )

    @routes.get("/get_server_info", include_in_schema=False)
    @routes.get("/server_info", openapi_extra=doc(None, ServerInfo))
    async def server_info(request: Request) -> Response:
        """Facts of the server and what it is doing; with the admin key, also its settings."""
        return json_response(
            ServerInfo(
                version=info.version,
                status=serving.trouble or "ready",
                uptime=time.monotonic() - started,
                device=info.device,
                page_size=info.page_size,
                max_total_tokens=info.max_total_tokens,
                max_running_requests=info.max_running_requests,
                max_queued_requests=info.max_queued_requests,
                stats=await engine_stats(serving),
                settings=dict(info.settings) if serving.keys.may_administer(request.headers) else None,
            )
        )

    return routes
