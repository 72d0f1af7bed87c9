"""Who may call: an API key for every route, a separate admin key for those that change or reveal the server's state.

Without an admin key the admin routes exist only where the server listens on loopback; they then need the API key, if
there is one.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_core.config import ServerArgs
from sglang_core.errors import RequestError
from sglang_core.server.errors import error_response

# Probes and scrapers rarely carry a key. These answer with counts and states only, never with anybody's text.
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/health_generate", "/metrics"})


class Keys:
    """The digests of both keys, and what a caller's bearer token opens."""

    def __init__(self, server: ServerArgs) -> None:
        self._api = _digest(server.api_key.encode()) if server.api_key else None
        self._admin = _digest(server.admin_api_key.encode()) if server.admin_api_key else None
        self._loopback = is_loopback(server.host)

    @property
    def has_admin_routes(self) -> bool:
        return self._admin is not None or self._loopback

    def may_call(self, headers: Headers) -> bool:
        """The API key opens every ordinary route, and so does the admin key."""
        return self._api is None or _matches(headers, self._api) or _matches(headers, self._admin)

    def may_administer(self, headers: Headers) -> bool:
        """For callers that `may_call`: without an admin key, those on this machine."""
        if self._admin is not None:
            return _matches(headers, self._admin)
        return self._loopback and _from_this_machine(headers)

    def require_admin(self, request: Request) -> None:
        """Raises RequestError 403 unless the caller may administer."""
        if self.may_administer(request.headers):
            return
        if self._admin is not None:
            way_out = "send the admin key as 'Authorization: Bearer KEY'"
        elif self._loopback:
            way_out = "call it from this machine, by its loopback address and not from a web page"
        else:
            way_out = "start the server with --admin-api-key"
        raise RequestError(f"{request.url.path} is for administrators; {way_out}", code="admin_only", status=403)


class KeyGuard:
    """ASGI middleware: no key, no route, not even a 404."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self.keys.may_call(Headers(scope=scope)):
            message = "missing or wrong API key; send it as 'Authorization: Bearer KEY'"
            response = error_response(RequestError(message, code="invalid_api_key", status=401))
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _matches(headers: Headers, digest: bytes | None) -> bool:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if digest is None or scheme.lower() != "bearer":
        return False
    # Headers are latin-1 text of whatever bytes came; digests make the compare safe for any bytes and any length.
    return hmac.compare_digest(_digest(token.strip().encode("latin-1")), digest)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _from_this_machine(headers: Headers) -> bool:
    """Whether a call that needs no key was made on purpose: a web page brings its own Origin, or a rebound Host."""
    origin = headers.get("origin")
    hosts = [urlsplit(f"//{headers.get('host', '')}").hostname] + ([urlsplit(origin).hostname] if origin else [])
    return all(host is not None and is_loopback(host) for host in hosts)
