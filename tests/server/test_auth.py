from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import connect
from tests.server.fake_client import FakeClient
from tests.server.test_validation import CHAT, VALID, error_of

API, ADMIN = "käy-ö", "admin-key"
OPEN = ("/livez", "/readyz", "/health", "/health_generate", "/metrics")
CLOSED = ("/v1/models", "/model_info", "/server_info", "/docs", "/openapi.json", "/nope")


def bearer(key: str) -> dict[str, Any]:
    return {"headers": [(b"Authorization", b"Bearer " + key.encode())]}


async def test_without_keys_everything_is_open_on_loopback(client: FakeClient) -> None:
    async with connect(client) as http:
        for path in (*OPEN, *CLOSED[:-1]):
            assert (await http.get(path)).status_code == 200
        assert (await http.post("/flush_cache")).status_code == 200
        assert (await http.get("/server_info")).json()["settings"] is not None
        assert (await http.post("/abort_request", json={"abort_all": True})).status_code == 200
    assert client.aborted == [""]


async def test_an_api_key_closes_all_but_the_probes(client: FakeClient) -> None:
    async with connect(client, api_key=API) as http:
        for path in OPEN:
            assert (await http.get(path)).status_code == 200
        for path in CLOSED:
            response = await http.get(path)
            assert error_of(response, 401)["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
        error_of(await http.post(CHAT, json=VALID[CHAT]), 401)
        assert len(client.requests) == 1  # the probe's own
        assert (await http.post(CHAT, json=VALID[CHAT], **bearer(API))).status_code == 200
        for path in CLOSED[:-1]:
            assert (await http.get(path, **bearer(API))).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic abc",
        "Bearer käy".encode(),
        "Bearer käy-ö".encode("latin-1"),
        b"Bearer \xff\xfe",
    ],
)
async def test_what_is_not_the_key(client: FakeClient, header: bytes) -> None:
    async with connect(client, api_key=API) as http:
        error_of(await http.get("/v1/models", headers=[(b"Authorization", header)]), 401)


async def test_the_scheme_is_case_insensitive(client: FakeClient) -> None:
    async with connect(client, api_key="k") as http:
        assert (await http.get("/v1/models", headers={"Authorization": "bearer k"})).status_code == 200


async def test_an_admin_key_is_needed_for_admin_routes_and_opens_the_others(client: FakeClient) -> None:
    async with connect(client, api_key=API, admin_api_key=ADMIN, host="0.0.0.0") as http:
        assert error_of(await http.post("/flush_cache", **bearer(API)), 403)["code"] == "admin_only"
        error_of(await http.post("/abort_request", json={"abort_all": True}, **bearer(API)), 403)
        assert (await http.get("/server_info", **bearer(API))).json()["settings"] is None
        assert (client.flushed, client.aborted) == (0, [])
        assert (await http.post("/flush_cache", **bearer(ADMIN))).status_code == 200
        assert (await http.post("/abort_request", json={"abort_all": True}, **bearer(ADMIN))).status_code == 200
        assert (await http.get("/server_info", **bearer(ADMIN))).json()["settings"] is not None
        assert (await http.get("/v1/models", **bearer(ADMIN))).status_code == 200


async def test_an_admin_key_alone_leaves_ordinary_routes_open(client: FakeClient) -> None:
    async with connect(client, admin_api_key=ADMIN) as http:
        assert (await http.get("/v1/models")).status_code == 200
        error_of(await http.post("/flush_cache"), 403)


async def test_admin_routes_are_absent_off_loopback_without_an_admin_key(client: FakeClient) -> None:
    async with connect(client, api_key=API, host="0.0.0.0") as http:
        error_of(await http.post("/flush_cache", **bearer(API)), 404)
        error_of(await http.post("/abort_request", json={"abort_all": True}, **bearer(API)), 403)
        assert (await http.get("/server_info", **bearer(API))).json()["settings"] is None
        assert "/flush_cache" not in (await http.get("/openapi.json", **bearer(API))).json()["paths"]
    assert (client.flushed, client.aborted) == (0, [])


async def test_on_loopback_the_api_key_stands_in_for_the_admin_key(client: FakeClient) -> None:
    async with connect(client, api_key=API) as http:
        error_of(await http.post("/flush_cache"), 401)
        assert (await http.post("/flush_cache", **bearer(API))).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:30000"}, 200),
        ({"Host": "[::1]:30000"}, 200),
        ({"Origin": "http://localhost:8080"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "rebound.example"}, 403),
    ],
)
async def test_a_web_page_cannot_administer_a_server_without_keys(
    client: FakeClient, headers: dict[str, str], status: int
) -> None:
    async with connect(client) as http:
        assert (await http.post("/flush_cache", headers=headers)).status_code == status
        shown = (await http.get("/server_info", headers=headers)).json()["settings"]
    assert (shown is not None) == (status == 200)


async def test_no_cors(client: FakeClient) -> None:
    async with connect(client) as http:
        asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        response = await http.options(CHAT, headers=asked)
        assert response.status_code == 405
        assert not [name for name in response.headers if name.startswith("access-control")]
