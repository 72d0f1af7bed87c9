"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.responses import Response

from sglang_core.server.body import json_response
from sglang_core.server.openai_request import model_not_found
from sglang_core.server.openai_types import Model, ModelList
from sglang_core.server.openapi import doc
from sglang_core.server.serving import Serving


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])
    info = serving.info
    model = Model(
        id=info.served_model_name, created=int(time.time()), root=info.model_path, max_model_len=info.context_length
    )

    @routes.get("/v1/models", openapi_extra=doc(None, ModelList))
    async def list_models() -> Response:
        """The one model that is served."""
        return json_response(ModelList(data=[model]))

    @routes.get("/v1/models/{name:path}", openapi_extra=doc(None, Model))
    async def get_model(name: str) -> Response:
        """The model of that name, or 404."""
        if name != model.id:
            raise model_not_found(name, model.id)
        return json_response(model)

    return routes
