"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.responses import Response

from sglang_core.server.body import json_response
from sglang_core.server.openai_request import adapter_of
from sglang_core.server.openai_types import Model, ModelList
from sglang_core.server.openapi import doc
from sglang_core.server.serving import Serving


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])
    info = serving.info
    model = Model(
        id=info.served_model_name, created=int(time.time()), root=info.model_path, max_model_len=info.context_length
    )

    def adapter(name: str) -> Model:
        path = serving.client.adapters[name]
        return Model(id=name, created=model.created, root=path, max_model_len=model.max_model_len, parent=model.id)

    @routes.get("/v1/models", openapi_extra=doc(None, ModelList))
    async def list_models() -> Response:
        """The model that is served, and its LoRA adapters."""
        return json_response(ModelList(data=[model, *(adapter(name) for name in serving.client.adapters)]))

    @routes.get("/v1/models/{name:path}", openapi_extra=doc(None, Model))
    async def get_model(name: str) -> Response:
        """The model or adapter of that name, or 404."""
        asked = adapter_of(name, model.id, serving.client.adapters)
        return json_response(adapter(asked) if asked else model)

    return routes
