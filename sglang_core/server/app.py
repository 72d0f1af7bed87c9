"""The whole HTTP application: every route over one client."""

from __future__ import annotations

from fastapi import FastAPI

from sglang_core.config import EngineConfig
from sglang_core.engine.requests import Client
from sglang_core.server import (
    adapters,
    admin,
    docs_page,
    errors,
    health,
    info,
    native,
    openai_chat,
    openai_completions,
    openai_models,
    openapi,
    tokens,
)
from sglang_core.server.auth import KeyGuard
from sglang_core.server.serving import Serving

ROUTERS = (openai_chat, openai_completions, openai_models, native, tokens, info, admin, adapters, health, docs_page)


def create_app(client: Client, config: EngineConfig) -> FastAPI:
    """An ASGI application that serves `client`. `app.state.serving` is its `Serving`, which `run` drains."""
    app = FastAPI(
        title="SGLang Core",
        version=client.info.version,
        description="OpenAI's endpoints, SGLang's native ones, probes and metrics.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    serving = app.state.serving = Serving(client, config)
    for part in ROUTERS:
        app.include_router(part.router(serving))
    errors.install(app)
    openapi.install(app)
    app.add_middleware(KeyGuard, keys=serving.keys)
    return app
