from __future__ import annotations

from typing import Any

import httpx
import pytest

from sglang_core.types import LogprobParams, SamplingParams
from tests.server.fake_client import FakeClient
from tests.server.test_chat import events

PATH = "/generate"


async def ask(http: httpx.AsyncClient, **body: Any) -> Any:
    response = await http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_one_text(client: FakeClient, http: httpx.AsyncClient) -> None:
    answer = await ask(http, text="hi", sampling_params={"max_new_tokens": 3}, rid="r")
    latency = answer["meta_info"].pop("e2e_latency")
    assert latency > 0
    assert answer == {
        "text": "One",
        "output_ids": [79, 110, 101],
        "meta_info": {
            "id": "r",
            "finish_reason": {"type": "length", "length": 3},
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "cached_tokens": 1,
        },
    }


async def test_defaults_are_sglangs_not_the_checkpoints(client: FakeClient, http: httpx.AsyncClient) -> None:
    await ask(http, text="hi")
    await ask(http, input_ids=[1] * 500)
    assert client.requests[0].sampling == SamplingParams(max_new_tokens=128)
    assert client.requests[1].sampling == SamplingParams(max_new_tokens=12)  # what fits
    assert client.requests[0].logprob is None


async def test_sampling_params(client: FakeClient, http: httpx.AsyncClient) -> None:
    params = {
        "max_new_tokens": 5,
        "min_new_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.2,
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "no_stop_trim": True,
        "n": 2,
        "sampling_seed": 4,
        "logit_bias": {"9": 1.5},
    }
    await ask(http, text="hi", sampling_params=params)
    expected = {**params, "stop": ("a", "b"), "stop_token_ids": (7,), "logit_bias": {9: 1.5}, "seed": 4}
    del expected["sampling_seed"]
    assert client.requests[0].sampling == SamplingParams(**expected)
    await ask(http, text="hi", sampling_params={"seed": 3}, priority=2, extra_key="k")
    assert client.requests[1].sampling.seed == 3
    assert (client.requests[1].priority, client.requests[1].salt) == (2, "k")


async def test_a_batch_is_an_array_even_of_one(http: httpx.AsyncClient) -> None:
    assert len(await ask(http, text=["a"])) == 1
    assert len(await ask(http, input_ids=[[1], [2]])) == 2


async def test_a_batch_with_a_value_a_prompt(client: FakeClient, http: httpx.AsyncClient) -> None:
    answers = await ask(
        http,
        text=["a", "b", "c"],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2, "n": 2}, {"max_new_tokens": 3}],
        rid=["x", "y", "z"],
        return_logprob=[True, False, True],
        logprob_start_len=[0, -1, -1],
        top_logprobs_num=[2, 0, 0],
    )
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [1, 2, 2, 3]
    assert [answer["meta_info"]["id"] for answer in answers] == ["x", "y-0", "y-1", "z"]
    assert [request.logprob for request in client.requests] == [
        LogprobParams(top_logprobs_num=2, logprob_start_len=0),
        None,
        LogprobParams(),
    ]
    assert "output_token_logprobs" not in answers[1]["meta_info"]


async def test_one_rid_for_a_batch_is_numbered(client: FakeClient, http: httpx.AsyncClient) -> None:
    await ask(http, text=["a", "b"], rid="r")
    assert [request.rid for request in client.requests] == ["r_0", "r_1"]


@pytest.mark.parametrize("with_text", [False, True])
async def test_logprobs(http: httpx.AsyncClient, with_text: bool) -> None:
    answer = await ask(
        http,
        text="ab",
        sampling_params={"max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=with_text,
    )
    meta = answer["meta_info"]

    def text(char: str) -> str | None:
        return char if with_text else None

    assert meta["input_token_logprobs"] == [[None, 97, text("a")], [-0.5, 98, text("b")]]
    assert meta["input_top_logprobs"] == [None, [[-0.5, 98, text("b")], [-1.5, 97, text("a")]]]
    assert meta["output_token_logprobs"] == [[-0.5, 79, text("O")]]
    assert meta["output_top_logprobs"] == [[[-0.5, 79, text("O")], [-1.5, 97, text("a")]]]


async def test_the_prompt_is_scored_without_new_tokens(http: httpx.AsyncClient) -> None:
    body = {"text": "ab", "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    answer = await ask(http, **body)
    assert (answer["text"], answer["output_ids"]) == ("", [])
    assert answer["meta_info"]["completion_tokens"] == 0
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert answer["meta_info"]["output_token_logprobs"] == []
    assert len(answer["meta_info"]["input_token_logprobs"]) == 2
    (event,) = events(await http.post(PATH, json={**body, "stream": True}))
    assert event["meta_info"]["input_token_logprobs"] == answer["meta_info"]["input_token_logprobs"]


async def test_stream_events_carry_everything_so_far(http: httpx.AsyncClient) -> None:
    body = {"text": "a", "sampling_params": {"max_new_tokens": 3}, "stream": True, "return_logprob": True}
    got = events(await http.post(PATH, json=body))
    assert [e["text"] for e in got] == ["O", "On", "One"]
    assert [e["output_ids"] for e in got] == [[79], [79, 110], [79, 110, 101]]
    assert [len(e["meta_info"]["output_token_logprobs"]) for e in got] == [1, 2, 3]
    assert [e["meta_info"]["finish_reason"] for e in got] == [None, None, {"type": "length", "length": 3}]
    assert all("index" not in e for e in got)


async def test_stream_events_of_a_batch_are_numbered(http: httpx.AsyncClient) -> None:
    body = {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 2, "n": 2}, "stream": True}
    got = events(await http.post(PATH, json=body))
    assert sorted({e["index"] for e in got}) == [0, 1, 2, 3]
    last = {e["index"]: e["text"] for e in got}
    assert last == dict.fromkeys(range(4), "On")


async def test_stop_reasons(http: httpx.AsyncClient) -> None:
    stopped = await ask(http, text="a", sampling_params={"stop": "two"})
    assert (stopped["text"], stopped["meta_info"]["finish_reason"]) == ("One, ", {"type": "stop", "matched": "two"})
    kept = await ask(http, text="a", sampling_params={"stop": "two", "no_stop_trim": True})
    assert kept["text"] == "One, two"


async def test_tokens_there_and_back(http: httpx.AsyncClient) -> None:
    there = (await http.post("/tokenize", json={"prompt": "añb"})).json()
    assert there == {"tokens": [97, 195, 177, 98], "count": 4, "max_model_len": 512}
    back = await http.post("/detokenize", json={"tokens": there["tokens"]})
    assert back.json() == {"text": "añb"}
    batch = (await http.post("/tokenize", json={"prompt": ["a", ""]})).json()
    assert (batch["tokens"], batch["count"]) == ([[97], []], [1, 0])
    assert (await http.post("/detokenize", json={"tokens": [[97], []]})).json() == {"text": ["a", ""]}
    special = {"tokens": [97, 256], "skip_special_tokens": False}
    assert (await http.post("/detokenize", json=special)).json() == {"text": "a<eos>"}


@pytest.mark.parametrize("tokens", [[300], [-1], ["a"], "a", [1, [2]], [[1], 2], [None], [1.5], {"a": 1}, [10**30]])
async def test_tokens_that_are_none(http: httpx.AsyncClient, tokens: Any) -> None:
    response = await http.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tokens")
