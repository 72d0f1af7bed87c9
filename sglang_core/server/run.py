"""Start an engine, serve it over HTTP, and end both in order.

The first SIGTERM or SIGINT drains: /readyz turns 503, new requests are refused, running ones get `drain_timeout` seconds.
The second ends what still runs, the third leaves without a word; engine processes end with this one in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_core.config import EngineConfig
from sglang_core.engine.replicas import start_client
from sglang_core.engine.requests import Client
from sglang_core.errors import RequestError, SglangError
from sglang_core.server.app import create_app
from sglang_core.server.auth import is_loopback
from sglang_core.server.banner import banner
from sglang_core.server.body import json_response
from sglang_core.server.errors import error_response
from sglang_core.server.health import OK
from sglang_core.server.http_heads import BoundedHeads
from sglang_core.server.info import engine_stats
from sglang_core.server.listen import base_url, listen
from sglang_core.server.serving import Serving

log = logging.getLogger(__name__)
KEEP_ALIVE = 75  # seconds; longer than the usual load balancer keeps an idle connection
LAST_WORDS = 2.0  # seconds that aborted streams get to say so
SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_FAILED = 1
T = TypeVar("T")


def serve(config: EngineConfig, *, on_ready: Callable[[str], None] | None = None) -> int:
    """Serve until a signal; the exit status. `on_ready` gets the base URL once requests are taken.
    Raises ConfigError where the port cannot be had, and what the engine's start raises."""
    logging.basicConfig(level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.root.level))  # its life is told by the banner
    sock = listen(config.server)
    with contextlib.closing(sock):
        return int(uvloop.run(_Life(config, sock, on_ready).run()))


class Front:
    """The ASGI app that uvicorn holds. Until `app` is set the engine loads, and only /livez says yes."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            loading = RequestError("the model is loading; retry once /readyz answers 200", code="loading", status=503)
            response = json_response(OK) if scope["path"] == "/livez" else error_response(loading)
            await response(scope, receive, send)


class _Http(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Life:
    """One server from start to exit."""

    def __init__(self, config: EngineConfig, sock: socket.socket, on_ready: Callable[[str], None] | None) -> None:
        self.config, self.sock, self.on_ready = config, sock, on_ready
        self.front = Front()
        self.http = _Http(
            uvicorn.Config(
                self.front,
                http=BoundedHeads,
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(LAST_WORDS),
            )
        )
        self.stop, self.quit = asyncio.Event(), asyncio.Event()  # the first and the second signal
        self.status = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        listening = asyncio.create_task(self.http.serve([self.sock]))
        listening.add_done_callback(lambda _: self.stop.set())
        try:
            client = await _first(start_client(self.config), self.stop)
            if client is not None:
                try:
                    await self._serve(client)
                finally:
                    await client.close()
        finally:
            self.http.should_exit = True
            self.http.force_exit = self.quit.is_set()
            await listening
        return self.status

    async def _serve(self, client: Client) -> None:
        app = create_app(client, self.config)
        serving: Serving = app.state.serving
        self.front.app = app
        server, url = self.config.server, base_url(self.config.server, self.sock)
        if not is_loopback(server.host) and not server.api_key:
            log.warning("listening on %s without --api-key: whoever reaches the port may use the model", server.host)
        print(banner(client.info, server, url, await engine_stats(serving), client.tokenizer is not None), flush=True)
        if self.on_ready is not None:
            self.on_ready(url)
        await self.stop.wait()
        await self._drain(serving)

    async def _drain(self, serving: Serving) -> None:
        serving.is_draining = True
        if serving.num_running:
            log.info("waiting for %d running requests; another Ctrl-C aborts them", serving.num_running)
            await _first(serving.drain(self.config.server.drain_timeout), self.quit)
        if serving.num_running:
            log.warning("aborting %d requests that still run", serving.num_running)
            with contextlib.suppress(SglangError):
                await serving.abort("")
            await serving.drain(LAST_WORDS)

    def _on_signal(self, number: int) -> None:
        if self.quit.is_set():
            os._exit(128 + number)
        if self.stop.is_set():
            self.status = 128 + number
            self.quit.set()
        self.stop.set()


async def _first(work: Coroutine[Any, Any, T], event: asyncio.Event) -> T | None:
    """The result of `work`; None, and `work` cancelled, if the event comes first."""
    task, waiter = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        waiter.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)
