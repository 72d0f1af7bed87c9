"""LoRA adapters over HTTP: how requests name them, how administrators load them, and what is said about unknown ones."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import connect
from tests.server.fake_client import FakeClient
from tests.server.test_auth import ADMIN, bearer
from tests.server.test_validation import CHAT, NATIVE, TEXT, VALID, error_of

LOAD, UNLOAD = "/load_lora_adapter", "/unload_lora_adapter"


@pytest.fixture
def client() -> FakeClient:
    return FakeClient(adapters={"caps": "/adapters/caps", "haiku": "/adapters/haiku"})


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "fields, adapter",
    [
        ({}, ""),
        ({"model": "fake/model"}, ""),
        ({"model": "fake/model:caps"}, "caps"),
        ({"model": "caps"}, "caps"),
        ({"lora_path": "haiku"}, "haiku"),
        ({"model": "fake/model", "lora_path": "haiku"}, "haiku"),
        ({"model": "fake/model:caps", "lora_path": "caps"}, "caps"),
    ],
)
async def test_openai_requests_name_one(
    path: str, fields: dict[str, Any], adapter: str, client: FakeClient, http: httpx.AsyncClient
) -> None:
    answer = (await http.post(path, json=VALID[path] | fields)).json()
    assert client.requests[-1].adapter == adapter
    assert answer["model"] == fields.get("model", "fake/model")


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "fields, status, param",
    [
        ({"model": "fake/model:nope"}, 404, "model"),
        ({"model": "other:caps"}, 404, "model"),
        ({"model": "fake/model:"}, 404, "model"),
        ({"lora_path": "nope"}, 400, "lora_path"),
        ({"model": "caps", "lora_path": "haiku"}, 400, "lora_path"),
    ],
)
async def test_unknown_ones_are_refused_with_the_known(
    path: str, fields: dict[str, Any], status: int, param: str, client: FakeClient, http: httpx.AsyncClient
) -> None:
    error = error_of(await http.post(path, json=VALID[path] | fields), status)
    assert error["param"] == param and "caps" in error["message"] and not client.requests


async def test_native_requests_name_one_each(client: FakeClient, http: httpx.AsyncClient) -> None:
    batch = {"text": ["a", "b", "c"], "lora_path": ["caps", None, "haiku"]}
    assert (await http.post(NATIVE, json=batch)).status_code == 200
    assert [request.adapter for request in client.requests] == ["caps", "", "haiku"]
    await http.post(NATIVE, json={"text": ["a", "b"], "lora_path": "caps"})
    assert [request.adapter for request in client.requests[3:]] == ["caps", "caps"]
    for wrong in (["caps"], ["caps", "nope"], [3, None], "nope", {"a": 1}):
        assert error_of(await http.post(NATIVE, json={"text": ["a", "b"], "lora_path": wrong}))["param"] == "lora_path"


async def test_models_lists_them_with_their_parent(http: httpx.AsyncClient) -> None:
    models = (await http.get("/v1/models")).json()["data"]
    assert [(m["id"], m.get("parent"), m["root"]) for m in models] == [
        ("fake/model", None, "/models/fake"),
        ("caps", "fake/model", "/adapters/caps"),
        ("haiku", "fake/model", "/adapters/haiku"),
    ]
    for name in ("caps", "fake/model:caps"):
        assert (await http.get(f"/v1/models/{name}")).json()["id"] == "caps"
    assert "caps" in error_of(await http.get("/v1/models/nope"), 404)["message"]


async def test_load_and_unload(client: FakeClient, http: httpx.AsyncClient) -> None:
    loaded = await http.post(LOAD, json={"lora_name": "new", "lora_path": "/adapters/new", "pinned": True})
    assert loaded.json() == {"success": True, "loaded_adapters": client.adapters} and "new" in client.adapters
    assert (await http.post(CHAT, json=VALID[CHAT] | {"model": "new"})).status_code == 200
    assert (await http.post(UNLOAD, json={"lora_name": "new"})).json()["loaded_adapters"] == client.adapters
    error_of(await http.post(CHAT, json=VALID[CHAT] | {"model": "new"}), 404)
    assert "caps" in error_of(await http.post(UNLOAD, json={"lora_name": "new"}))["message"]
    refused = error_of(await http.post(LOAD, json={"lora_name": "x", "lora_path": "/broken"}))
    assert refused["param"] == "lora_path" and "adapter_config.json" in refused["message"]


@pytest.mark.parametrize(
    "path, body, param",
    [
        (LOAD, {"lora_path": "x"}, "lora_name"),
        (LOAD, {"lora_name": "x"}, "lora_path"),
        (LOAD, {"lora_name": "", "lora_path": "x"}, "lora_name"),
        (LOAD, {"lora_name": "x", "lora_path": 3}, "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "y", "pinned": "yes"}, "pinned"),
        (UNLOAD, {}, "lora_name"),
        (UNLOAD, {"lora_name": "x" * 1000}, "lora_name"),
    ],
)
async def test_bad_bodies(path: str, body: dict[str, Any], param: str, http: httpx.AsyncClient) -> None:
    assert error_of(await http.post(path, json=body))["param"] == param


async def test_only_administrators_change_them(client: FakeClient) -> None:
    body = {"lora_name": "caps", "lora_path": "/adapters/caps"}
    async with connect(client, admin_api_key=ADMIN) as http:
        for path in (LOAD, UNLOAD):
            assert (await http.post(path, json=body)).status_code in (401, 403)
            assert (await http.post(path, json=body, **bearer(ADMIN))).status_code == 200
    async with connect(client, host="0.0.0.0") as http:  # open to others, and no key to tell them apart
        for path in (LOAD, UNLOAD):
            assert (await http.post(path, json=body)).status_code == 404
