"""A real uvicorn on a free port, in a thread, over a FakeClient."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from sglang_core.config import EngineConfig
from sglang_core.server.app import create_app
from sglang_core.server.serving import Serving
from tests.server.fake_client import FakeClient

PATIENCE = 60.0  # seconds; a loaded machine takes many


class Live:
    """`url`, the fake behind it, and its `Serving`."""

    def __init__(self, client: FakeClient, config: EngineConfig) -> None:
        self.client = client
        app = create_app(client, config)
        self.serving: Serving = app.state.serving
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_config=None, lifespan="off", http="httptools", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)

    def start(self) -> None:
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)


@contextmanager
def serving(client: FakeClient, **settings: object) -> Iterator[Live]:
    live = Live(client, EngineConfig.from_flat(**settings))
    live.start()
    try:
        yield live
    finally:
        live.stop()


def wait_for(condition: Callable[[], object]) -> None:
    """Poll until it holds. Fails after `PATIENCE`, which a loaded machine does not reach."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
