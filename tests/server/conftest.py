from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest

from sglang_core.config import EngineConfig
from sglang_core.server.app import create_app
from tests.server.fake_client import FakeClient
from tests.server.live import Live, serving

Connect = Callable[..., httpx.AsyncClient]


def connect(client: FakeClient, **settings: object) -> httpx.AsyncClient:
    """An HTTP client of the app itself, with no socket between."""
    app = create_app(client, EngineConfig.from_flat(**settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
async def http(client: FakeClient) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(client) as http:
        yield http


@pytest.fixture
def live(client: FakeClient) -> Iterator[Live]:
    with serving(client) as live:
        yield live
