"""/openapi.json made from the same pydantic and msgspec types that the routes use."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sglang_core.server.errors import ErrorBody

REF = "#/components/schemas/"
_bodies: dict[str, type[BaseModel]] = {}
_answers: dict[str, type[msgspec.Struct]] = {}


def doc(
    body: type[BaseModel] | None,
    answer: type[msgspec.Struct],
    *,
    events: type[msgspec.Struct] | None = None,
    parts: tuple[type[BaseModel], ...] = (),
) -> dict[str, Any]:
    """A route's `openapi_extra`: what it takes (`parts` are named in its fields), what it answers, its stream's events."""
    content = {"application/json": {"schema": _ref(answer)}}
    if events is not None:
        content["text/event-stream"] = {"schema": _ref(events)}
    errors = {
        "description": "what was wrong and the way out",
        "content": {"application/json": {"schema": _ref(ErrorBody)}},
    }
    extra: dict[str, Any] = {
        "responses": {"200": {"description": "done", "content": content}, "4XX": errors, "5XX": errors}
    }
    if body is not None:
        _bodies.update({model.__name__: model for model in (body, *parts)})
        schema = {"$ref": REF + body.__name__}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return extra


def install(app: FastAPI) -> None:
    """Make `app.openapi()` resolve what `doc` refers to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(model, "validation") for model in _bodies.values()], ref_template=REF + "{model}")
    _, answers = msgspec.json.schema_components(list(_answers.values()), ref_template=REF + "{name}")
    schema["components"] = {
        "schemas": dict(sorted({**bodies.get("$defs", {}), **answers}.items())),
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
    }
    schema["security"] = [{}, {"bearer": []}]
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own error form, which no route here uses
    return schema


def _ref(answer: type[msgspec.Struct]) -> dict[str, str]:
    _answers[answer.__name__] = answer
    return {"$ref": REF + answer.__name__}
