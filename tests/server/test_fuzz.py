"""Any JSON is answered by 200 or by a 4xx in the error form, never by a 500, and leaves nothing running."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_core.config import EngineConfig
from sglang_core.server.app import create_app
from tests.server.fake_client import VOCAB_SIZE, FakeClient

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", "none", "auto", "", "a", "\x00", "\U0001f600"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
texts = st.text(min_size=1, max_size=8)
flags = st.booleans()
counts = st.integers(0, 6)
ids = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4)
units = st.floats(0, 1, exclude_min=True)
contents = texts | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)
roles = st.sampled_from(["user", "assistant", "system", "developer", "tool"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1, max_size=3)
prompts = texts | ids | st.lists(texts, min_size=1, max_size=3) | st.lists(ids, min_size=1, max_size=3)
sampling: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": units,
    "top_k": st.integers(-1, 50),
    "min_p": units,
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": units,
    "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1).map(str), st.floats(-100, 100), max_size=3),
    "stop": texts | st.lists(texts, max_size=3),
    "stop_token_ids": ids,
    "ignore_eos": flags,
    "no_stop_trim": flags,
    "n": st.integers(1, 4),
    "seed": st.integers(-(2**63), 2**63 - 1),
}
openai: dict[str, st.SearchStrategy[Any]] = {
    **sampling,
    "model": st.just("fake/model"),
    "stream": flags,
    "max_tokens": counts,
    "priority": counts,
    "cache_salt": texts,
    "user": texts,
}


def bodies(needed: str, strategy: st.SearchStrategy[Any], fields: dict[str, st.SearchStrategy[Any]]) -> Any:
    """Valid objects, those with up to two fields of any JSON, and any JSON at all."""
    valid = st.fixed_dictionaries({needed: strategy}, optional=fields)
    names = st.sampled_from([needed, *fields, "response_format", "tools", "lora_path", "best_of", "rid", "extra"])
    return valid | st.builds(dict.__or__, valid, st.dictionaries(names, values, max_size=2)) | values


native_sampling = {**sampling, "min_new_tokens": counts, "sampling_seed": counts}
native = {
    "sampling_params": bodies("max_new_tokens", counts, native_sampling),
    "stream": flags,
    "return_logprob": flags,
    "logprob_start_len": st.integers(-1, 1),
    "top_logprobs_num": counts,
    "return_text_in_logprobs": flags,
    "extra_key": texts,
}
TARGETS = {
    "/v1/chat/completions": bodies(
        "messages", messages, {**openai, "logprobs": flags, "max_completion_tokens": counts}
    ),
    "/v1/completions": bodies("prompt", prompts, {**openai, "logprobs": counts, "echo": flags}),
    "/generate": bodies("text", texts | st.lists(texts, min_size=1, max_size=3), native),
    "/tokenize": bodies("prompt", texts | st.lists(texts), {"add_special_tokens": flags}),
    "/detokenize": bodies("tokens", ids | st.lists(ids), {"skip_special_tokens": flags}),
    "/abort_request": bodies("rid", texts, {"abort_all": flags}),
}


class App:
    """One app and one loop for all examples; making them anew for each would take most of the time."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = FakeClient()
        self.app = create_app(self.client, EngineConfig())
        transport = httpx.ASGITransport(self.app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    def post(self, path: str, content: bytes) -> httpx.Response:
        self.client.aborted.clear()
        headers = {"Content-Type": "application/json"}
        return self.loop.run_until_complete(self.http.post(path, content=content, headers=headers))


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    app = App()
    yield app
    app.loop.run_until_complete(app.http.aclose())
    app.loop.close()


@pytest.mark.parametrize("path", TARGETS)
@FUZZ
@given(data=st.data())
def test_any_json_is_answered_in_form(app: App, path: str, data: st.DataObject) -> None:
    check(app, path, json.dumps(data.draw(TARGETS[path])).encode())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
@FUZZ
@given(content=st.binary(max_size=40))
def test_any_bytes_are_answered_in_form(app: App, path: str, content: bytes) -> None:
    check(app, path, content)


def check(app: App, path: str, content: bytes) -> None:
    response = app.post(path, content)
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert (error["message"] and error["type"] == "invalid_request_error") or response.status_code == 404
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in response.text
    assert app.app.state.serving.num_running == 0
