"""What is refused, how it is said, and that nothing of it reaches the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from sglang_core.server import body, limits
from tests.server.conftest import connect
from tests.server.fake_client import CONTEXT_LENGTH, INFO, VOCAB_SIZE, FakeClient

CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
USER = [{"role": "user", "content": "hi"}]
VALID: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER, "max_tokens": 4},
    TEXT: {"prompt": "hi", "max_tokens": 4},
    NATIVE: {"text": "hi", "sampling_params": {"max_new_tokens": 4}},
}
BOTH = [  # fields of both OpenAI endpoints
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 101}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": limits.MAX_N + 1}, "n"),
    ({"n": 100}, "n"),  # more than the engine holds
    ({"stop": ""}, "stop[0]"),
    ({"stop": 7}, "stop[0]"),
    ({"stop": ["x"] * (limits.MAX_STOPS + 1)}, "stop"),
    ({"stop": "x" * (limits.MAX_STOP_CHARS + 1)}, "stop[0]"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {str(i): 0 for i in range(limits.MAX_LOGIT_BIASES + 1)}}, "logit_bias"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"max_tokens": CONTEXT_LENGTH}, "max_tokens"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"rid": "with space"}, "rid"),
    ({"rid": ""}, "rid"),
    ({"rid": "x" * 1000}, "rid"),
    ({"priority": 2**40}, "priority"),
    ({"cache_salt": "s" * 1000}, "cache_salt"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"regex": "a+"}, "regex"),
    ({"ebnf": "root ::= x"}, "ebnf"),
    ({"user": 3}, "user"),
]
CHAT_ONLY = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": [], "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "messages[0].tool_calls[0]"),
    ({"messages": [{"role": "user", "content": "x" * CONTEXT_LENGTH}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 100 * CONTEXT_LENGTH}]}, "messages[0].content"),
    ({"max_completion_tokens": CONTEXT_LENGTH}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"explode": True}}, "messages"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]
TEXT_ONLY = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": [1, True]}, "prompt[1]"),
    ({"prompt": [VOCAB_SIZE]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": ["a"] * 41}, "prompt"),
    ({"prompt": "x" * CONTEXT_LENGTH}, "prompt"),
    ({"prompt": "x" * 100 * CONTEXT_LENGTH}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"echo": "yes"}, "echo"),
]
NATIVE_ONLY = [
    ({"text": None}, "text"),
    ({"input_ids": [1]}, "text"),
    ({"text": None, "input_ids": [VOCAB_SIZE]}, "input_ids"),
    ({"text": None, "input_ids": "hi"}, "input_ids"),
    ({"text": [1, 2]}, "text"),
    ({"text": "x" * CONTEXT_LENGTH}, "text"),
    ({"sampling_params": [{}]}, "sampling_params"),
    ({"sampling_params": "greedy"}, "sampling_params"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    ({"text": ["a", "b"], "sampling_params": [None, False]}, "sampling_params[1]"),
    ({"text": ["a", "b"], "sampling_params": [{}, []]}, "sampling_params[1]"),
    ({"text": ["a", "b"], "sampling_params": [{}, {"top_p": 2}]}, "sampling_params[1].top_p"),
    ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ({"sampling_params": {"max_new_tokens": 2, "min_new_tokens": 3}}, "sampling_params.min_new_tokens"),
    ({"sampling_params": {"json_schema": "{}"}}, "sampling_params.json_schema"),
    ({"sampling_params": {"regex": "a"}}, "sampling_params.regex"),
    ({"sampling_params": {"stop_token_ids": [VOCAB_SIZE]}}, "sampling_params.stop_token_ids"),
    ({"rid": ["a"]}, "rid"),
    ({"rid": 3}, "rid"),
    ({"rid": "a b"}, "rid"),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
    ({"return_logprob": 1}, "return_logprob"),
    ({"return_logprob": True, "top_logprobs_num": 1000}, "top_logprobs_num"),
    ({"return_logprob": True, "logprob_start_len": 3}, "logprob_start_len"),
    ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
    ({"image_data": "http://x"}, "image_data"),
    ({"lora_path": "x"}, "lora_path"),
    ({"token_ids_logprob": [1]}, "token_ids_logprob"),
]
JSON = {"Content-Type": "application/json"}
CASES = [(CHAT, *case) for case in BOTH + CHAT_ONLY] + [(TEXT, *case) for case in BOTH + TEXT_ONLY]
CASES += [(NATIVE, *case) for case in NATIVE_ONLY]


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(error["message"]) < 1000
    return dict(error)


@pytest.mark.parametrize(("path", "change", "param"), CASES, ids=lambda value: str(value)[:60])
async def test_refused(
    client: FakeClient, http: httpx.AsyncClient, path: str, change: dict[str, Any], param: str
) -> None:
    error = error_of(await http.post(path, content=json.dumps({**VALID[path], **change}), headers=JSON))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert client.requests == []


@pytest.mark.parametrize("path", VALID)
async def test_what_the_refusals_vary_is_valid(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.post(path, json=VALID[path])).status_code == 200


@pytest.mark.parametrize("path", VALID)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a": "\\ud800"}', b'{"a": 1e999}', b"[" * 100_000, b'{"a":' * 5000],
    ids=["empty", "cut", "not utf-8", "nan", "surrogate", "infinity", "deep array", "deep object"],
)
async def test_malformed_json(http: httpx.AsyncClient, path: str, content: bytes) -> None:
    assert error_of(await http.post(path, content=content, headers=JSON))["code"] == "invalid_json"


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"x"', b"{}"])
async def test_json_of_the_wrong_shape(http: httpx.AsyncClient, content: bytes) -> None:
    for path in VALID:
        error_of(await http.post(path, content=content, headers=JSON))


async def test_a_body_that_is_not_json_by_its_type(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_too_large(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, declared: bool) -> None:
    monkeypatch.setattr(body, "MAX_BODY_BYTES", 1000)

    async def pieces() -> Any:
        for _ in range(11):
            yield b" " * 100

    content: Any = b" " * 1001 if declared else pieces()
    assert error_of(await http.post(CHAT, content=content, headers=JSON), 413)["code"] == "body_too_large"


async def test_unknown_routes_and_methods(http: httpx.AsyncClient) -> None:
    assert error_of(await http.get("/v1/nope"), 404)["code"] == "unknown_url"
    response = await http.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_another_model_is_a_404(http: httpx.AsyncClient, path: str) -> None:
    error = error_of(await http.post(path, json={**VALID[path], "model": "gpt-4"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "fake/model" in error["message"]
    assert (await http.post(path, json={**VALID[path], "model": "fake/model"})).status_code == 200
    assert (await http.post(path, json={**VALID[path], "model": None})).status_code == 200


async def test_context_overflow_says_the_numbers(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post(TEXT, json={"prompt": [1] * 500, "max_tokens": 20}))
    assert error["code"] == "context_length_exceeded"
    for number in ("512", "500", "20", "520", "12"):
        assert number in error["message"].replace(";", " ").split() or f"{number}," in error["message"]


async def test_a_small_kv_pool_bounds_requests_too() -> None:
    async with connect(FakeClient(info=replace(INFO, max_total_tokens=100))) as http:
        error = error_of(await http.post(TEXT, json={"prompt": [1] * 90, "max_tokens": 20}))
        assert "--max-total-tokens" in error["message"]
        usage = (await http.post(CHAT, json={"messages": USER, "ignore_eos": True})).json()["usage"]
        assert usage["total_tokens"] == 100


async def test_unknown_fields_are_named_not_refused(http: httpx.AsyncClient) -> None:
    asked = {**VALID[CHAT], "zork": 1, "a,b\r\nX-Evil: 1 é": 2, "stream": True, "stream_options": {"x": 1}}
    asked["messages"] = [{"role": "user", "content": "hi", "mood": "good"}]
    response = await http.post(CHAT, json=asked)
    assert response.status_code == 200
    names = response.headers["x-ignored-params"].split(", ")
    assert names == ["zork", "a?b??X-Evil:?1??", "stream_options.x", "messages[].mood"]
    native = await http.post(NATIVE, json={"text": "a", "sampling_params": {"foo": 1}, "bar": 2})
    assert native.headers["x-ignored-params"] == "bar, sampling_params.foo"
    assert "x-ignored-params" not in (await http.post(CHAT, json=VALID[CHAT])).headers


@pytest.mark.parametrize("path", VALID)
async def test_null_counts_as_absent(http: httpx.AsyncClient, path: str) -> None:
    nulls = dict.fromkeys(("temperature", "stop", "stream", "n", "logit_bias", "response_format", "tools", "rid"))
    response = await http.post(path, json={**nulls, **VALID[path]})
    assert response.status_code == 200
    assert "x-ignored-params" not in response.headers


async def test_a_server_without_tokenizer_takes_ids_only() -> None:
    client = FakeClient(tokenizer=None)
    async with connect(client) as http:
        for path in VALID:
            assert error_of(await http.post(path, json=VALID[path]))["code"] == "no_tokenizer"
        assert error_of(await http.post("/tokenize", json={"prompt": "a"}))["code"] == "no_tokenizer"
        answer = await http.post(NATIVE, json={"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}})
        assert len(answer.json()["output_ids"]) == 3
        response = await http.post(TEXT, json={"prompt": [1], "logprobs": 1, "max_tokens": 1})
        assert response.json()["choices"][0]["logprobs"]["tokens"] == ["token_id:79"]


async def test_a_model_without_chat_template_says_how_to_give_one(client: FakeClient, http: httpx.AsyncClient) -> None:
    client.tokenizer.has_template = False  # type: ignore[union-attr]
    assert "--chat-template" in error_of(await http.post(CHAT, json=VALID[CHAT]))["message"]
