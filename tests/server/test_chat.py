"""What a chat request asks of the engine, and what a stream looks like on the wire."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from sglang_core.types import LogprobParams, SamplingParams
from tests.server.conftest import connect
from tests.server.fake_client import CONTEXT_LENGTH, INFO, FakeClient

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
RENDERED = b"user: hi\nassistant: "


def events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


async def ask(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post(PATH, json={"messages": [USER], **fields})


async def test_defaults_are_the_checkpoints_and_the_room_left(client: FakeClient, http: httpx.AsyncClient) -> None:
    await ask(http)
    request = client.requests[0]
    room = CONTEXT_LENGTH - len(RENDERED)
    assert request.input_ids == list(RENDERED)
    assert request.sampling == SamplingParams(max_new_tokens=room, temperature=0.6, top_p=0.95, top_k=20)
    assert (request.stream, request.logprob, request.add_special_tokens) == (False, None, False)
    assert request.rid is not None and request.rid.startswith("chatcmpl-")


async def test_every_field_takes_effect(client: FakeClient, http: httpx.AsyncClient) -> None:
    await ask(
        http,
        max_tokens=9,
        max_completion_tokens=7,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=0,
        min_p=0.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        stop="END",
        stop_token_ids=[3],
        ignore_eos=True,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        no_stop_trim=True,
        n=2,
        seed=-1,
        logprobs=True,
        top_logprobs=4,
        user="u",
        priority=3,
        cache_salt="s",
        rid="me",
        stream=True,
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        modalities=["text"],
        return_cached_tokens_details=True,
    )
    request = client.requests[0]
    assert request.sampling == SamplingParams(
        max_new_tokens=7,
        min_new_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias={5: -100.0},
        stop=("END",),
        stop_token_ids=(3,),
        ignore_eos=True,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        no_stop_trim=True,
        n=2,
        seed=2**63 - 1,
    )
    assert request.logprob == LogprobParams(top_logprobs_num=4)
    assert (request.rid, request.priority, request.salt, request.stream) == ("me", 3, "s", True)


async def test_top_k_zero_of_the_checkpoint_means_all() -> None:
    client = FakeClient(info=replace(INFO, generation_defaults={"top_k": 0, "max_new_tokens": 3, "do_sample": True}))
    async with connect(client) as http:
        await ask(http)
    assert client.requests[0].sampling.top_k == -1
    assert client.requests[0].sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([{"role": "developer", "content": "be kind"}, USER], "system: be kind\nuser: hi"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "user: a\nb"),
        ([{"role": "user", "content": "hi", "name": "Ann"}], "user: hi"),
        ([{"role": "tool", "content": "12", "tool_call_id": "c1"}], "tool: 12"),
    ],
)
async def test_messages_reach_the_template(
    client: FakeClient, http: httpx.AsyncClient, messages: list[Any], rendered: str
) -> None:
    assert (await http.post(PATH, json={"messages": messages, "max_tokens": 1})).status_code == 200
    assert bytes(client.requests[0].input_ids or []).decode() == rendered + "\nassistant: "


async def test_earlier_tool_calls_carry_their_arguments_as_objects(client: FakeClient, http: httpx.AsyncClient) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    assert (await http.post(PATH, json={"messages": messages, "max_tokens": 1})).status_code == 200
    assert "'arguments': {'a': 1}" in bytes(client.requests[0].input_ids or []).decode()


async def test_the_last_message_can_be_gone_on_with(client: FakeClient, http: httpx.AsyncClient) -> None:
    messages = [USER, {"role": "assistant", "content": "Well"}]
    await http.post(PATH, json={"messages": messages, "continue_final_message": True, "max_tokens": 1})
    await http.post(PATH, json={"messages": [USER], "add_generation_prompt": False, "max_tokens": 1})
    prompts = [bytes(request.input_ids or []).decode() for request in client.requests]
    assert prompts == ["user: hi\nassistant: Well", "user: hi"]


async def test_stream_events(http: httpx.AsyncClient) -> None:
    got = events(await ask(http, stream=True, max_tokens=2, rid="r"))
    assert [e["choices"][0]["delta"] for e in got] == [
        {"role": "assistant", "content": ""},
        {"content": "O"},
        {"content": "n"},
    ]
    assert [e["choices"][0]["finish_reason"] for e in got] == [None, None, "length"]
    assert all(e["id"] == "r" and e["object"] == "chat.completion.chunk" and "usage" not in e for e in got)


async def test_usage_in_every_event(http: httpx.AsyncClient) -> None:
    got = events(
        await ask(
            http, stream=True, max_tokens=3, stream_options={"include_usage": True, "continuous_usage_stats": True}
        )
    )
    assert [e["usage"]["completion_tokens"] for e in got] == [1, 1, 2, 3, 3]
    assert got[-1]["choices"] == []
    assert got[-1]["usage"] == {
        "prompt_tokens": len(RENDERED),
        "completion_tokens": 3,
        "total_tokens": len(RENDERED) + 3,
        "prompt_tokens_details": {"cached_tokens": len(RENDERED) // 2},
    }


async def test_part_of_a_character_is_no_event_but_has_its_logprobs(
    client: FakeClient, http: httpx.AsyncClient
) -> None:
    client.answer = "é!"
    got = events(await ask(http, stream=True, max_tokens=3))
    assert [e["choices"][0]["delta"].get("content") for e in got] == ["", "é", "!"]
    got = events(await ask(http, stream=True, max_tokens=3, logprobs=True))
    tokens = [t for e in got for t in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [t["token"] for t in tokens] == ["\\xc3", "\\xa9", "!"]
    assert bytes(b for t in tokens for b in t["bytes"]).decode() == "é!"


async def test_finish_reasons(client: FakeClient, http: httpx.AsyncClient) -> None:
    choice = (await ask(http)).json()["choices"][0]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", 256)
    choice = (await ask(http, stop=["two"])).json()["choices"][0]
    assert (choice["finish_reason"], choice["matched_stop"], choice["message"]["content"]) == ("stop", "two", "One, ")
    client.aborted.append("gone")
    assert (await ask(http, rid="gone")).json()["choices"][0]["finish_reason"] == "abort"


async def test_no_tokens_at_all(http: httpx.AsyncClient) -> None:
    reply = (await ask(http, max_tokens=0)).json()
    assert reply["choices"][0]["message"]["content"] == ""
    assert reply["usage"]["completion_tokens"] == 0
    got = events(await ask(http, max_completion_tokens=0, stream=True))
    assert [e["choices"][0]["finish_reason"] for e in got] == [None, "length"]
