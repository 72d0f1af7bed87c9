"""POST /abort_request for everyone, POST /flush_cache for administrators."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from sglang_core.errors import RequestError
from sglang_core.server.body import RequestBody, ignored_header, json_response, read_body
from sglang_core.server.limits import MAX_RID_CHARS
from sglang_core.server.openapi import doc
from sglang_core.server.serving import Serving


class AbortRequest(RequestBody):
    rid: str = Field("", max_length=MAX_RID_CHARS, description="the rid of a request, or the id of a running answer")
    abort_all: bool = Field(False, description="administrators only")


class Aborted(msgspec.Struct, kw_only=True):
    aborted: int  # requests of that name; 0 where it had ended already


class Flushed(msgspec.Struct, kw_only=True):
    success: bool


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["SGLang"])

    @routes.post("/abort_request", openapi_extra=doc(AbortRequest, Aborted))
    async def abort_request(request: Request) -> Response:
        """Abort one request by its rid, or all."""
        body = await read_body(request, AbortRequest)
        if body.abort_all:
            serving.keys.require_admin(request)
        elif not body.rid:
            raise RequestError("rid is required (or abort_all)", param="rid", code="missing_required_parameter")
        count = await serving.abort("" if body.abort_all else body.rid)
        return json_response(Aborted(aborted=count), ignored_header(body.ignored()))

    if not serving.keys.has_admin_routes:
        return routes

    @routes.post("/flush_cache", openapi_extra=doc(None, Flushed))
    async def flush_cache(request: Request) -> Response:
        """Empty the radix cache; 409 while running requests pin it."""
        serving.keys.require_admin(request)
        if not await serving.client.flush_cache():
            message = "running requests pin the cache; wait for them or abort them, then flush again"
            raise RequestError(message, code="cache_in_use", status=409)
        return json_response(Flushed(success=True))

    return routes
