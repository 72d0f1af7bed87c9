"""What a caller of `Engine` may do wrong ends that call in words, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sglang_core import Engine
from sglang_core.engine.requests import GenerateChunk, GenerateRequest
from sglang_core.errors import RequestError
from sglang_core.types import SamplingParams

LONG = {"max_new_tokens": 1900, "ignore_eos": True, "temperature": 0}
SHORT = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0}


def is_idle(engine: Engine) -> bool:
    client, stats = engine.client, engine.stats()
    return stats["running"] == stats["waiting"] == 0 and not client._answers and not client._groups


def wait_until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 10
    while not is_idle(engine):
        assert time.monotonic() < deadline, "a request still runs"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_params": {"top_k": 2**80}}, "top_k"),
        ({"sampling_params": {"max_new_tokens": 2**80}}, "max_new_tokens"),
        ({"sampling_params": {"temperature": float("inf")}}, "temperature"),
        ({"sampling_params": {"logit_bias": {5: float("nan")}}}, "logit_bias"),
        ({"sampling_params": {"logit_bias": {2**70: 1.0}}}, "logit_bias"),
        ({"sampling_params": {"stop_token_ids": [2**70]}}, "stop_token_ids"),
        ({"sampling_params": {"stop": ["\ud800"]}}, "stop"),
        ({"sampling_params": {"n": 10**5}}, "n=100000"),
        ({"sampling_params": "greedy"}, "must be a dict"),
        ({"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": -7}, "top_logprobs_num"),
        ({"return_logprob": True, "logprob_start_len": "0"}, "logprob_start_len"),
        ({"input_ids": [1, 2.5]}, "input_ids"),
        ({"input_ids": [1, True]}, "input_ids"),
        ({"input_ids": [1, "a"]}, "input_ids"),
        ({"input_ids": [2**70]}, "input_ids"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"rid": 5}, "rid"),
        ({"rid": "\ud800"}, "rid"),
        ({"priority": "high"}, "priority"),
        ({"priority": 2**70}, "priority"),
    ],
)
def test_what_the_engine_could_not_take_is_refused(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    given = arguments if {"prompt", "input_ids"} & set(arguments) else {"prompt": "Hi", **arguments}
    with pytest.raises(RequestError, match=message):
        engine.generate(**given)
    assert is_idle(engine)


def test_more_alternatives_than_tokens_are_all_tokens(engine: Engine) -> None:
    answer = engine.generate("Hi there", SHORT, return_logprob=True, logprob_start_len=0, top_logprobs_num=10**6)
    assert {len(top) for top in answer["meta_info"]["input_top_logprobs"][1:]} == {engine.info.vocab_size}


@pytest.mark.parametrize("seed", [2**70, -(2**70), 2**63 - 1])
def test_any_integer_is_a_seed(engine: Engine, seed: int) -> None:
    params = {"max_new_tokens": 3, "seed": seed, "n": 2}
    first, again = engine.generate("Hi", params), engine.generate("Hi", params)
    assert [answer["output_ids"] for answer in first] == [answer["output_ids"] for answer in again]


def test_the_first_prompt_that_fails_ends_the_others(engine: Engine) -> None:
    with pytest.raises(RequestError, match="context_length"):
        engine.generate(input_ids=[[5] * 10, [5] * 3000], sampling_params=LONG)
    wait_until_idle(engine)
    assert engine.generate("Hi", SHORT)["meta_info"]["completion_tokens"] == 6


def on_loop(engine: Engine, coroutine: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, engine.client._ready.get_loop()).result(30)


def request(rid: str, params: dict[str, Any], **fields: Any) -> GenerateRequest:
    return GenerateRequest(text="The capital of France is", sampling=SamplingParams(**params), rid=rid, **fields)


async def rest(chunks: AsyncIterator[GenerateChunk]) -> list[int]:
    return [token_id async for chunk in chunks for token_id in chunk.token_ids]


@pytest.mark.parametrize("ended_by", ["leaving", "a stop string"])
def test_a_rid_may_be_used_again_at_once(engine: Engine, ended_by: str) -> None:
    """What the engine still says about the first request, steps in flight and its end, is not the second's."""

    async def twice() -> list[int]:
        if ended_by == "leaving":
            first = engine.client.generate(request("again", LONG))
            await anext(first)
            await first.aclose()  # type: ignore[attr-defined]
        else:
            await rest(engine.client.generate(request("again", LONG | {"stop": (spoken,)})))
        return await rest(engine.client.generate(request("again", SHORT)))

    want = engine.generate("The capital of France is", SHORT)
    spoken = want["text"][1:5]
    for _ in range(3):
        assert on_loop(engine, twice()) == want["output_ids"]
    wait_until_idle(engine)


def test_a_rid_may_look_like_anothers_answer(engine: Engine) -> None:
    async def both() -> tuple[list[int], list[int]]:
        pair = engine.client.generate(request("twin", SHORT | {"n": 2}))
        alone = engine.client.generate(request("twin-0", SHORT))
        return tuple(await asyncio.gather(rest(pair), rest(alone)))  # type: ignore[return-value]

    pair, alone = on_loop(engine, both())
    assert sorted(pair) == sorted(alone * 2)


def test_abort_knows_requests_and_answers_by_their_whole_names(engine: Engine) -> None:
    async def run() -> dict[str, list[str]]:
        reasons: dict[str, list[str]] = {"job": [], "job-1": [], "job1": []}

        async def follow(rid: str, n: int) -> None:
            async for chunk in engine.client.generate(request(rid, LONG | {"n": n}, stream=False)):
                assert chunk.finish_reason is not None
                reasons[rid].append(f"{chunk.rid} {chunk.finish_reason.type}")

        tasks = [asyncio.create_task(follow("job", 2)), asyncio.create_task(follow("job1", 1))]
        await asyncio.sleep(0.05)
        for unknown in ("jo", "job-", "job-2"):
            await engine.client.abort(unknown)
        await engine.client.abort("job-1")  # an answer of the first
        while not reasons["job"]:
            await asyncio.sleep(0.01)
        assert reasons == {"job": ["job-1 abort"], "job-1": [], "job1": []}
        await engine.client.abort("job")
        await tasks[0]
        assert reasons["job"][1:] == ["job-0 abort"] and not reasons["job1"]
        await engine.client.abort("")
        await tasks[1]
        return reasons

    assert on_loop(engine, run())["job1"] == ["job1 abort"]
    assert is_idle(engine)


def test_a_slow_reader_of_a_stream_gets_the_rest_in_few_events(engine: Engine) -> None:
    stream = engine.generate(["Hi", "Hello"], {"max_new_tokens": 200, "ignore_eos": True}, stream=True)
    next(stream)
    while engine.stats()["running"]:
        time.sleep(0.02)
    events = list(stream)
    assert len(events) < 12, "they were joined while nobody read them"
    assert {len(event["output_ids"]) for event in events if event["meta_info"]["finish_reason"]} == {200}
