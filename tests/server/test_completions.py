from __future__ import annotations

from typing import Any

import httpx
import pytest

from sglang_core.types import LogprobParams
from tests.server.fake_client import FakeClient
from tests.server.test_chat import events

PATH = "/v1/completions"


async def ask(http: httpx.AsyncClient, prompt: Any, **fields: Any) -> Any:
    response = await http.post(PATH, json={"prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("ab", [[97, 98]]), ([97, 98], [[97, 98]]), (["a", "b"], [[97], [98]]), ([[97], [98]], [[97], [98]])],
)
async def test_prompts_in_every_form(client: FakeClient, http: httpx.AsyncClient, prompt: Any, ids: Any) -> None:
    reply = await ask(http, prompt, max_tokens=2, n=2)
    assert [request.input_ids for request in client.requests] == ids
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(ids)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert reply["usage"]["completion_tokens"] == 2 * 2 * len(ids)


async def test_sixteen_tokens_or_what_fits(client: FakeClient, http: httpx.AsyncClient) -> None:
    await ask(http, "a")
    await ask(http, "a" * 505)
    assert [request.sampling.max_new_tokens for request in client.requests] == [16, 7]


async def test_requests_of_one_body_have_names_of_their_own(client: FakeClient, http: httpx.AsyncClient) -> None:
    reply = await ask(http, ["a", "b"], rid="r")
    assert [request.rid for request in client.requests] == ["r-p0", "r-p1"]
    assert reply["id"] == "r"


async def test_logprobs_of_the_answer_only_unless_echoed(client: FakeClient, http: httpx.AsyncClient) -> None:
    reply = await ask(http, "ab", logprobs=2, max_tokens=2)
    assert client.requests[0].logprob == LogprobParams(top_logprobs_num=2, logprob_start_len=-1)
    assert reply["choices"][0]["logprobs"] == {
        "tokens": ["O", "n"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"O": -0.5, "a": -1.5}, {"n": -0.5, "a": -1.5}],
        "text_offset": [0, 1],
    }
    reply = await ask(http, "ab", logprobs=0, max_tokens=1, echo=True)
    assert client.requests[1].logprob == LogprobParams(top_logprobs_num=0, logprob_start_len=0)
    assert reply["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "O"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.5}, {"O": -0.5}],
        "text_offset": [0, 1, 2],
    }


async def test_text_offsets_count_characters_not_bytes(client: FakeClient, http: httpx.AsyncClient) -> None:
    client.answer = "é€x"
    logprobs = (await ask(http, "a", logprobs=0, max_tokens=6))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [*(f"bytes:\\x{b:02x}" for b in "é€".encode()), "x"]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo(http: httpx.AsyncClient, prompt: Any, stream: bool) -> None:
    response = await http.post(PATH, json={"prompt": prompt, "echo": True, "max_tokens": 2, "n": 2, "stream": stream})
    texts = ["", ""]
    for part in events(response) if stream else [response.json()]:
        for choice in part["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["abOn", "abOn"]


async def test_every_echoed_answer_has_the_prompts_logprobs(http: httpx.AsyncClient) -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 1, "n": 2}
    for choice in (await ask(http, **body))["choices"]:
        assert choice["logprobs"]["tokens"] == ["a", "b", "O"]
    response = await http.post(PATH, json={**body, "stream": True})
    for part in events(response):
        assert part["choices"][0]["logprobs"]["tokens"] == ["a", "b", "O"]


async def test_a_prompt_is_scored_without_new_tokens(client: FakeClient, http: httpx.AsyncClient) -> None:
    reply = await ask(http, ["ab", "c"], echo=True, logprobs=1, max_tokens=0)
    assert [choice["text"] for choice in reply["choices"]] == ["ab", "c"]
    assert [choice["logprobs"]["tokens"] for choice in reply["choices"]] == [["a", "b"], ["c"]]
    assert reply["usage"]["completion_tokens"] == 0
    assert client.requests[0].sampling.max_new_tokens == 1  # the engine needs something to do


async def test_streams_of_several_prompts_end_with_one_usage(http: httpx.AsyncClient) -> None:
    response = await http.post(
        PATH, json={"prompt": ["a", "bc"], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    )
    got = events(response)
    assert {e["choices"][0]["index"] for e in got[:-1]} == {0, 1}
    assert got[-1]["choices"] == []
    assert (got[-1]["usage"]["prompt_tokens"], got[-1]["usage"]["completion_tokens"]) == (3, 4)
