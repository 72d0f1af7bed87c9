from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROUTES = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{name}",
    "/generate",
    "/tokenize",
    "/detokenize",
    "/flush_cache",
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/abort_request",
    "/model_info",
    "/server_info",
    "/health",
    "/health_generate",
    "/livez",
    "/readyz",
    "/metrics",
}


def refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for inner in node.values():
            yield from refs(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from refs(inner)


async def test_the_schema_has_every_route_and_resolves(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/openapi.json")).json()
    assert set(schema["paths"]) == ROUTES
    known = {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
    assert set(refs(schema)) <= known
    chat = schema["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    assert {"temperature", "max_completion_tokens", "stream_options", "chat_template_kwargs"} <= set(chat["properties"])
    temperature = next(kind for kind in chat["properties"]["temperature"]["anyOf"] if kind["type"] == "number")
    assert (temperature["minimum"], temperature["maximum"]) == (0, 100)


async def test_the_docs_page_needs_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    page = (await http.get("/docs")).text
    assert "/v1/chat/completions" in page and "max_completion_tokens" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


async def test_the_documentation_has_every_route_and_metric(http: httpx.AsyncClient) -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for path in ROUTES:
        assert f"{path}`" in text, path
    for line in (await http.get("/metrics")).text.splitlines():
        if line.startswith("# TYPE sglang_") and not line.split()[2].endswith(("_created", "_requests")):
            assert f"`{line.split()[2]}" in text, line
