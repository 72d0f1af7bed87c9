"""The engine end to end, in process, on the demo model in float32: its tokens against transformers and against itself."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

from sglang_core import Engine, demo
from sglang_core.errors import ConfigError, RequestError

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
PROMPTS = [
    "The capital of France is",
    "Hello! How are you today? I would like to know what the capital of Japan is, please, and what colour the sky has.",
    "One, two, three",
    "The days of the week are Monday, Tuesday,",
    "x",
]


@cache
def hf() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(demo.path())


def hf_greedy(prompt: str, num_tokens: int) -> list[int]:
    model, tokenizer = hf()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, -num_tokens:].tolist()


def hf_logprobs(ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(hf()[0](torch.tensor([ids])).logits[0].float(), dim=-1)


def test_greedy_tokens_are_those_of_transformers(engine: Engine) -> None:
    answers = engine.generate(PROMPTS, GREEDY)
    assert [answer["output_ids"] for answer in answers] == [hf_greedy(prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "settings",
    [
        {"disable_radix_cache": True},
        {"disable_overlap_schedule": True},
        {"chunked_prefill_size": 5},
        {"page_size": 1},
        {"page_size": 7, "max_total_tokens": 91},  # room for two at a time: retraction
        {"max_running_requests": 1, "schedule_policy": "fcfs"},
    ],
    ids=lambda s: "-".join(s),
)
def test_greedy_tokens_do_not_depend_on_settings(engine: Engine, settings: dict[str, Any]) -> None:
    want = [answer["output_ids"] for answer in engine.generate(PROMPTS, GREEDY)]
    given = {"max_total_tokens": 4096, **settings}
    with Engine(model_path="demo", device="cpu", dtype="float32", in_process=True, **given) as other:
        for _ in range(2):  # the second time on a warm cache
            assert [answer["output_ids"] for answer in other.generate(PROMPTS, GREEDY)] == want


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_neighbours(engine: Engine) -> None:
    params = {"temperature": 1.5, "top_p": 0.95, "top_k": 50, "max_new_tokens": 10, "seed": 7, "ignore_eos": True}
    alone = engine.generate(PROMPTS[0], params)["output_ids"]
    others = [params | {"seed": seed} for seed in (1, 2, 3)]
    batch = engine.generate([PROMPTS[0]] * 4, [*others, params])
    assert batch[3]["output_ids"] == alone
    assert len({tuple(answer["output_ids"]) for answer in batch}) > 1


def test_sampling_follows_the_models_distribution(engine: Engine) -> None:
    ids = hf()[1](PROMPTS[2])["input_ids"]
    answers = engine.generate(
        input_ids=ids, sampling_params={"temperature": 2.0, "max_new_tokens": 1, "n": 500, "top_k": 4, "seed": 1}
    )
    counts = Counter(answer["output_ids"][0] for answer in answers)
    logits = hf_logprobs(ids)[-1] / 2.0
    top = torch.topk(logits, 4)
    expected = dict(zip(top.indices.tolist(), torch.softmax(top.values, -1).tolist(), strict=True))
    assert set(counts) <= set(expected)
    for token_id, p in expected.items():  # five standard deviations of a binomial
        assert abs(counts[token_id] / 500 - p) < 5 * (p * (1 - p) / 500) ** 0.5 + 1e-6


def test_logprobs_of_input_and_output_are_those_of_transformers(engine: Engine) -> None:
    ids = hf()[1](PROMPTS[1])["input_ids"]
    answer = engine.generate(
        input_ids=ids, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0, top_logprobs_num=3
    )
    meta, output_ids = answer["meta_info"], answer["output_ids"]
    want = hf_logprobs(ids + output_ids)
    assert [entry[1] for entry in meta["input_token_logprobs"]] == ids
    assert meta["input_token_logprobs"][0][0] is None and meta["input_top_logprobs"][0] is None
    for i in range(1, len(ids)):
        assert meta["input_token_logprobs"][i][0] == pytest.approx(want[i - 1, ids[i]].item(), abs=1e-3)
        top = torch.topk(want[i - 1], 3)
        assert [entry[0] for entry in meta["input_top_logprobs"][i]] == pytest.approx(top.values.tolist(), abs=1e-3)
    for i, token_id in enumerate(output_ids):
        assert meta["output_token_logprobs"][i][0] == pytest.approx(want[len(ids) + i - 1, token_id].item(), abs=1e-3)
        assert meta["output_top_logprobs"][i][0][1] == token_id, "greedy takes the most likely"


def test_logprob_start_len_gives_the_tail_even_on_a_cached_prefix(engine: Engine) -> None:
    ids = hf()[1](PROMPTS[1])["input_ids"]
    engine.generate(input_ids=ids, sampling_params=GREEDY)
    start = len(ids) - 4
    answer = engine.generate(
        input_ids=ids, sampling_params=GREEDY, return_logprob=True, logprob_start_len=start, top_logprobs_num=0
    )
    want = hf_logprobs(ids)
    got = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
    assert got == pytest.approx([want[i - 1, ids[i]].item() for i in range(start, len(ids))], abs=1e-3)
    assert answer["meta_info"]["cached_tokens"] > 0


def test_the_second_time_a_prompt_comes_from_the_cache(engine: Engine) -> None:
    assert engine.flush_cache()
    first = engine.generate(PROMPTS[1], GREEDY)["meta_info"]
    second = engine.generate(PROMPTS[1], GREEDY)["meta_info"]
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == (second["prompt_tokens"] - 1) // engine.info.page_size * engine.info.page_size > 0


def test_bias_forces_a_token_and_min_new_tokens_keeps_the_answer_open(engine: Engine) -> None:
    eos = engine.info.eos_token_ids[0]
    forced = engine.generate("Hi", {"temperature": 0, "max_new_tokens": 5, "logit_bias": {str(eos): 100.0}})
    assert forced["output_ids"] == [eos]
    assert forced["meta_info"]["finish_reason"] == {"type": "stop", "matched": eos}
    held = engine.generate(
        "Hi", {"temperature": 0, "max_new_tokens": 9, "min_new_tokens": 4, "logit_bias": {str(eos): 100.0}}
    )
    assert len(held["output_ids"]) == 5 and held["output_ids"].index(eos) == 4


def test_penalties_forbid_repetition(engine: Engine) -> None:
    plain = engine.generate("a a a a a a a a", {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True})
    strict = {
        "temperature": 0,
        "max_new_tokens": 16,
        "ignore_eos": True,
        "presence_penalty": 2.0,
        "frequency_penalty": 2.0,
    }
    penalised = engine.generate("a a a a a a a a", strict)
    assert len(set(penalised["output_ids"])) >= len(set(plain["output_ids"]))
    biased = engine.generate("Hi", GREEDY | {"logit_bias": {"20": 50.0, "21": 49.0}})
    moved = engine.generate("Hi", GREEDY | {"logit_bias": {"20": 50.0, "21": 49.0}, "frequency_penalty": 2.0})
    assert Counter(moved["output_ids"]).most_common(1)[0][1] < Counter(biased["output_ids"]).most_common(1)[0][1]


def test_stop_strings_end_the_answer_and_its_tokens(engine: Engine) -> None:
    whole = engine.generate(PROMPTS[3], GREEDY)
    stop = whole["text"].strip()[4:9]
    cut = engine.generate(PROMPTS[3], GREEDY | {"stop": [stop]})
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert cut["output_ids"] == whole["output_ids"][: len(cut["output_ids"])]
    assert cut["meta_info"]["completion_tokens"] == len(cut["output_ids"]) < 12
    assert engine.stats()["running"] == 0


def test_streaming_grows_to_the_whole_answer(engine: Engine) -> None:
    whole = engine.generate(PROMPTS[:2], GREEDY)
    last: dict[int, dict[str, Any]] = {}
    events = 0
    for event in engine.generate(PROMPTS[:2], GREEDY, stream=True):
        assert event["text"].startswith(last.get(event["index"], {"text": ""})["text"])
        last[event["index"]] = event
        events += 1
    assert events > 4
    assert [last[i]["output_ids"] for i in (0, 1)] == [answer["output_ids"] for answer in whole]


def test_leaving_a_stream_aborts_its_request(engine: Engine) -> None:
    stream = engine.generate("Hi", {"max_new_tokens": 1500, "ignore_eos": True}, stream=True)
    next(stream)
    assert engine.stats()["running"] == 1
    stream.close()
    for _ in range(200):
        if not engine.stats()["running"]:
            break
    assert engine.stats()["running"] == 0


def test_async_generate(engine: Engine) -> None:
    async def both() -> tuple[Any, list[Any]]:
        answer = await engine.async_generate(PROMPTS[0], GREEDY)
        stream = await engine.async_generate(PROMPTS[0], GREEDY, stream=True)
        return answer, [event async for event in stream]

    answer, events = asyncio.run(both())
    assert events[-1]["output_ids"] == answer["output_ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "x", "sampling_params": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"prompt": "x", "sampling_params": {"top_p": 1.5}}, "top_p=1.5 must be between 0 and 1"),
        ({"prompt": "x", "sampling_params": {"top_p": float("nan")}}, "top_p"),
        ({"prompt": "x", "sampling_params": {"n": 0}}, "n=0 must be at least 1"),
        ({"prompt": "x", "sampling_params": {"stop": [""]}}, "stop strings must not be empty"),
        ({"input_ids": [99999]}, "token id 99999 is not in the vocabulary"),
        ({"input_ids": [5] * 2048}, "2048 tokens"),
        ({"prompt": ""}, "no tokens"),
        ({}, "exactly one of prompt and input_ids"),
    ],
)
def test_bad_requests_are_refused_in_words(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(**arguments)
    assert engine.generate(PROMPTS[0], GREEDY)["output_ids"] == hf_greedy(PROMPTS[0], 12), "the next one is untouched"


def test_duplicate_rids_are_refused_while_running(engine: Engine) -> None:
    stream = engine.generate("Hi", {"max_new_tokens": 500, "ignore_eos": True}, stream=True, rid="me")
    next(stream)
    with pytest.raises(RequestError, match="'me' is running already"):
        engine.generate("Hi", rid="me")
    engine.abort("me")
    last = list(stream)[-1]
    assert last["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_path": "demo", "device": "nonesuch"}, "no installed plugin provides device 'nonesuch'"),
        ({"model_path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"model_path": "demo", "context_length": 99999}, "beyond the model's 2048 positions"),
        ({"model_path": "demo", "max_total_tokens": 10**12}, "max_total_tokens"),
        ({"model_path": "demo", "page_sise": 8}, "did you mean 'page_size'"),
        ({"model_path": "demo", "tp_size": 2}, "in_process"),
    ],
)
def test_bad_settings_are_refused_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, Exception), match=message):
        Engine(in_process=True, **({"device": "cpu"} | settings))


def test_the_strict_device_runs_the_engine_with_every_rule_on(engine: Engine) -> None:
    """Traced steps, static shapes, NaN in every page that nobody wrote: the same tokens, retraction included."""
    want = [answer["output_ids"] for answer in engine.generate(PROMPTS, GREEDY)]
    with Engine(
        model_path="demo",
        device="strict",
        dtype="float32",
        in_process=True,
        max_running_requests=3,
        chunked_prefill_size=16,
        context_length=64,
        max_total_tokens=80,
    ) as strict:
        for _ in range(2):
            assert [answer["output_ids"] for answer in strict.generate(PROMPTS, GREEDY)] == want


def test_verified_steps_are_counted_right_and_reported(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"dtype": "float32", "max_total_tokens": 4096, "verify_kernels": 1.0, "log_level": "info"}
    with (
        caplog.at_level(logging.INFO, logger="sglang_core.runner"),
        Engine(model_path="demo", device="acme", in_process=True, **settings) as other,
    ):
        assert other.generate(PROMPTS[0], GREEDY)["output_ids"] == engine.generate(PROMPTS[0], GREEDY)["output_ids"]
        stats = other.stats()
    assert stats["verified_steps"] >= 12 and stats["verify_failures"] == 0
    assert "steps verified against the reference bodies\n  " in caplog.text
