"""POST /load_lora_adapter and /unload_lora_adapter, for administrators."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from sglang_core.server.body import RequestBody, ignored_header, json_response, read_body
from sglang_core.server.limits import MAX_ADAPTER_CHARS, MAX_PATH_CHARS
from sglang_core.server.openapi import doc
from sglang_core.server.serving import Serving


class LoadAdapterRequest(RequestBody):
    lora_name: str = Field(min_length=1, max_length=MAX_ADAPTER_CHARS, description="name to serve it under")
    lora_path: str = Field(
        min_length=1, max_length=MAX_PATH_CHARS, description="folder on the server, hub id, or demo:NAME"
    )
    pinned: bool = Field(False, description="never let it leave the device or host memory for another")


class UnloadAdapterRequest(RequestBody):
    lora_name: str = Field(min_length=1, max_length=MAX_ADAPTER_CHARS)


class LoadedAdapters(msgspec.Struct, kw_only=True):
    success: bool
    loaded_adapters: dict[str, str]  # name -> path, after the change


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["SGLang"])
    if not serving.keys.has_admin_routes:
        return routes

    @routes.post("/load_lora_adapter", openapi_extra=doc(LoadAdapterRequest, LoadedAdapters))
    async def load_lora_adapter(request: Request) -> Response:
        """Serve a LoRA adapter while requests run; a name that is taken gets other weights for its next requests."""
        serving.keys.require_admin(request)
        body = await read_body(request, LoadAdapterRequest)
        await serving.client.load_lora_adapter(body.lora_name, body.lora_path, pinned=body.pinned)
        return answer(body)

    @routes.post("/unload_lora_adapter", openapi_extra=doc(UnloadAdapterRequest, LoadedAdapters))
    async def unload_lora_adapter(request: Request) -> Response:
        """Refuse new requests for an adapter, and answer when those that run with it have ended."""
        serving.keys.require_admin(request)
        body = await read_body(request, UnloadAdapterRequest)
        await serving.client.unload_lora_adapter(body.lora_name)
        return answer(body)

    def answer(body: RequestBody) -> Response:
        loaded = LoadedAdapters(success=True, loaded_adapters=dict(serving.client.adapters))
        return json_response(loaded, ignored_header(body.ignored()))

    return routes
