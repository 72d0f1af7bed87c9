"""GET /docs: the routes on one plain page, made from /openapi.json, with nothing fetched from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse

from sglang_core.server.serving import Serving

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#8882;padding:.1em .3em;border-radius:3px}"
    "td{padding:.15rem .8rem .15rem 0;vertical-align:top}summary{cursor:pointer;margin:.5rem 0}"
)


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    @routes.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page(request.app.openapi()))

    return routes


def page(schema: dict[str, Any]) -> str:
    schemas = schema["components"]["schemas"]
    parts = [
        _route(path, method.upper(), operation, schemas)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>{escape(schema['info']['description'])}"
        " Machine-readable: <a href=/openapi.json>/openapi.json</a></p>" + "".join(parts)
    )


def _route(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    head = f"<code>{method} {escape(path)}</code> {escape(operation.get('description', ''))}"
    body = operation.get("requestBody")
    if body is None:
        return f"<p>{head}</p>"
    name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    rows = "".join(_field(field, spec, schemas[name]) for field, spec in schemas[name]["properties"].items())
    return f"<details><summary>{head}</summary><table>{rows}</table></details>"


def _field(name: str, spec: dict[str, Any], owner: dict[str, Any]) -> str:
    default = (
        "required"
        if name in owner.get("required", ())
        else f"default {spec['default']}"
        if spec.get("default") is not None
        else ""
    )
    return f"<tr><td><code>{escape(name)}</code><td>{escape(default)}<td>{escape(spec.get('description', ''))}</tr>"
