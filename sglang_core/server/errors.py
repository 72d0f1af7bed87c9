"""Every error leaves as OpenAI's form, `{"error": {message, type, param, code}}`, whatever route it came from."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang_core.errors import EngineDeadError, QueueFullError, RequestError

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nobody is left to read it; it keeps hang-ups apart in middleware and logs
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER_UNAVAILABLE = 5  # seconds


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorInfo


def describe(exc: Exception) -> tuple[int, ErrorBody, dict[str, str]]:
    """The status, body and headers that tell a client about `exc`. Only what is raised on purpose is quoted."""
    headers: dict[str, str] = {}
    param, code = None, None
    if isinstance(exc, RequestError):
        status, message, param, code = exc.status, str(exc), exc.param, exc.code
        if isinstance(exc, QueueFullError):
            headers["Retry-After"] = str(exc.retry_after)
    elif isinstance(exc, EngineDeadError):
        status, message, code = 503, str(exc) or "the engine is not running", "engine_dead"
    elif isinstance(exc, HTTPException):
        status, message, code = exc.status_code, str(exc.detail), None
        headers |= dict(exc.headers or {})
    else:
        log.error("unexpected error while answering a request", exc_info=exc)
        status, message, code = 500, "internal error; the server's log has the details", "internal_error"
    if status == 503:
        headers.setdefault("Retry-After", str(RETRY_AFTER_UNAVAILABLE))
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, ErrorBody(ErrorInfo(message=message, type=kind, param=param, code=code)), headers


def error_response(exc: Exception) -> Response:
    status, body, headers = describe(exc)
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


class LastResort:
    """ASGI middleware: an exception nobody expected is a 500 in the same form, logged once."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception as exc:
            if started:  # too late for a status; uvicorn closes the connection
                raise
            await error_response(exc)(scope, receive, send)


def not_found(path: str) -> RequestError:
    return RequestError(f"no route {path!r}; GET /openapi.json lists them", code="unknown_url", status=404)


def install(app: FastAPI) -> None:
    """Make `app` answer every exception in this form."""

    async def answer(request: Request, exc: Exception) -> Response:
        return error_response(exc)

    async def answer_http(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        path, method = request.url.path, request.method
        if exc.status_code == 404:
            return error_response(not_found(path))
        if exc.status_code == 405:
            allowed: Mapping[str, str] = exc.headers or {}
            way_out = f"it takes {allowed['Allow']}" if "Allow" in allowed else "GET /openapi.json lists the methods"
            wrong = RequestError(f"{method} {path} is not allowed; {way_out}", code="method_not_allowed", status=405)
            response = error_response(wrong)
            response.headers.update(allowed)
            return response
        return error_response(exc)

    async def hung_up(request: Request, exc: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for kind in (RequestError, EngineDeadError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(ClientDisconnect, hung_up)
    app.add_middleware(LastResort)
