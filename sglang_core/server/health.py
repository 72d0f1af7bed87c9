"""Probes. /livez: a restart would not help. /readyz, /health: requests are taken. /health_generate: tokens are made."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sglang_core.engine.requests import GenerateRequest
from sglang_core.errors import RequestError, SglangError
from sglang_core.server.body import json_response
from sglang_core.server.disconnect import until_disconnect
from sglang_core.server.info import engine_stats
from sglang_core.server.limits import HEALTH_TIMEOUT
from sglang_core.server.metrics import CONTENT_TYPE
from sglang_core.server.openapi import doc
from sglang_core.server.serving import Serving, close, draw_rid
from sglang_core.types import SamplingParams


class Health(msgspec.Struct, kw_only=True):
    status: str


OK = Health(status="ok")


class TokenProbe:
    """Generates one token; callers that come while it runs share it, so that probes never pile up."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._running: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Raises RequestError 503 where no token comes in time."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._generate())
            self._running.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, if nobody waits
        await asyncio.shield(self._running)

    async def _generate(self) -> None:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT):
                tokens = await self._count_tokens()
        except TimeoutError:
            raise _unhealthy(f"the engine made no token within {HEALTH_TIMEOUT:g} seconds") from None
        except SglangError as exc:
            raise _unhealthy(str(exc)) from exc
        if not tokens:
            raise _unhealthy("the engine ended a request without a token")

    async def _count_tokens(self) -> int:
        info = self._serving.info
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        token_id = next(iter(info.eos_token_ids), 0)
        rid = draw_rid("health-")  # also the salt: the probe computes, it is not served from the cache
        source = self._serving.client.generate(
            GenerateRequest(input_ids=[token_id], sampling=sampling, rid=rid, salt=rid)
        )
        try:
            return sum([len(chunk.token_ids) async for chunk in source])
        finally:
            await close(source)


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["health"])
    probe = TokenProbe(serving)

    @routes.get("/livez", openapi_extra=doc(None, Health))
    async def livez() -> Response:
        """200 unless only a restart helps."""
        if not serving.client.is_alive:
            raise _unhealthy("the engine is not running; restart the server")
        return json_response(OK)

    @routes.get("/health", openapi_extra=doc(None, Health))
    @routes.get("/readyz", openapi_extra=doc(None, Health))
    async def readyz() -> Response:
        """200 while new requests are taken; 503 while loading, draining or dead."""
        if serving.trouble is not None:
            raise _unhealthy(serving.trouble)
        return json_response(OK)

    @routes.get("/health_generate", openapi_extra=doc(None, Health))
    async def health_generate(request: Request) -> Response:
        """200 once one token was really generated."""
        if serving.trouble is not None:
            raise _unhealthy(serving.trouble)
        await until_disconnect(request.receive, probe.check())
        return json_response(OK)

    metrics = serving.metrics
    if metrics is None:
        return routes

    @routes.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def scrape() -> Response:
        """Prometheus metrics."""
        stats = await engine_stats(serving)
        return Response(metrics.render(stats, serving.client.is_alive), headers={"Content-Type": CONTENT_TYPE})

    return routes


def _unhealthy(message: str) -> RequestError:
    return RequestError(message, code="unhealthy", status=503)
