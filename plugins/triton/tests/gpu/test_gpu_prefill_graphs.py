"""Prefills and mixed steps as graphs, over a driver that is the host: what an engine says is what it says without."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpuBackend, FakeGpuRuntime
from sglang_conformance.runner import Suite, Verdict
from sglang_triton.gpu import runtime as gpu_runtime
from sglang_triton.gpu.runtime import token_sizes

from sglang_core import Engine
from sglang_core.errors import ConfigError
from sglang_core.runner import model_runner
from sglang_core.runner.step_input import StepInput, build_step_input

MOST, SIZES = 40, [16, 32, 40]  # in steps of up to 48 tokens
SETTINGS: dict[str, Any] = {
    "model_path": "demo",
    "dtype": "float32",
    "in_process": True,
    "skip_tokenizer_init": True,
    "max_running_requests": 20,
    "context_length": 96,
    "chunked_prefill_size": 48,
    "max_total_tokens": 768,
}
FORWARDS = 4 + 1 + 2 * 2  # decode steps; 16 tokens; 32 and 40, of few reqs and of 20
SAMPLINGS = 4

FakeGpu = Callable[[], FakeGpuRuntime]
Step = tuple[str, int, bool]  # mode, tokens without padding, whether padded


@pytest.fixture(autouse=True)
def few_decode_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay on this driver spoils the memory of all other graphs."""
    monkeypatch.setattr(gpu_runtime, "batch_sizes", lambda largest: [1, 4, 16, largest])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    seen: list[Step] = []

    def noted(plan: Any, *args: Any, **options: Any) -> StepInput:
        made = build_step_input(plan, *args, **options)
        seen.append((str(plan.mode), len(plan.token_ids), made.padded))
        return made

    monkeypatch.setattr(model_runner, "build_step_input", noted)
    return seen


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(sum(lengths))
    return [[rng.randrange(3, 200) for _ in range(n)] for n in lengths]


def answers(engine: Engine, ids: list[list[int]], **options: Any) -> list[Any]:
    given = {"temperature": 0.0, "ignore_eos": True} | options
    return engine.generate(input_ids=ids, sampling_params=given, return_logprob=True, top_logprobs_num=2)


def agree(ours: list[Any], theirs: list[Any]) -> None:
    """The same tokens; sums over padded tiles may round elsewhere."""
    for a, b in zip(ours, theirs, strict=True):
        assert a["output_ids"] == b["output_ids"]
        mine, other = (
            torch.tensor([p for p, *_ in x["meta_info"]["output_token_logprobs"]], dtype=torch.float64) for x in (a, b)
        )
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


def test_mixed_steps_chunks_and_cached_prefixes_say_what_they_say_without_graphs(
    fake_gpu: FakeGpu, steps: list[Step]
) -> None:
    """More reqs than there is room for, of lengths that need several chunks, and the same once more with prefixes in the cache."""
    first = prompts(5, 70, 17, 33, 3, 9, 50, 1, 40, 26)
    again = [ids + more for ids, more in zip(first, prompts(*[7] * len(first)), strict=True)]
    made = []
    for tokens in (0, MOST):
        with Engine(device="fakegpu", prefill_graph_tokens=tokens, **SETTINGS) as engine:
            del steps[:]
            made.append([a for ids in (first, again) for a in answers(engine, ids, max_new_tokens=6)])
            stats = engine.stats()
        assert {padded for _, count, padded in steps if count > MOST} == {False}
        assert stats["eager_steps"] == sum(not padded for *_, padded in steps) > 0
    agree(*made)
    assert all(padded for _, count, padded in steps if count <= MOST)
    # Whether a prompt's end is alone in a step depends on when the prompts arrive.
    assert {"mixed", "decode"} <= {mode for mode, _, padded in steps if padded}


def test_each_edge_of_a_bucket(fake_gpu: FakeGpu, steps: list[Step]) -> None:
    """One token less than a bucket has, as many, and one more: alone, and in as many reqs as a bucket of few holds and one more."""
    lengths = [n + d for n in SIZES for d in (-1, 0, 1)]
    made = []
    for tokens in (0, MOST):
        with Engine(device="fakegpu", prefill_graph_tokens=tokens, disable_radix_cache=True, **SETTINGS) as engine:
            del steps[:]
            made.append([a for n in lengths for a in answers(engine, prompts(n), max_new_tokens=1)])
            for reqs in (15, 16, 17, 20):
                made[-1] += answers(engine, prompts(*[2] * reqs), max_new_tokens=1)
    agree(*made)
    assert [(count, padded) for _, count, padded in steps if count in lengths][: len(lengths)] == [
        (n, n <= MOST) for n in lengths
    ]


def test_what_else_differs_by_request(fake_gpu: FakeGpu, steps: list[Step]) -> None:
    """Sampling with filters and penalties, log-probabilities of the prompt, and adapters, in the first token's step and after."""
    sampling = [
        {"temperature": 0.9},
        {"temperature": 0.8, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"temperature": 0, "frequency_penalty": 1.0},
        {"temperature": 0},
    ]
    given = [one | {"ignore_eos": True, "max_new_tokens": 4} for one in sampling]
    ids = prompts(5, 12, 3, 9, 2, 8)
    made = []
    for tokens in (0, MOST):
        options = SETTINGS | {"prefill_graph_tokens": tokens, "lora_paths": ("capitals=demo:capitals",)}
        with Engine(device="fakegpu", **options) as engine:
            del steps[:]
            asked = {"input_ids": ids, "sampling_params": given, "return_logprob": True}
            made.append(engine.generate(**asked, logprob_start_len=0))
            made[-1] += engine.generate(**asked, lora_path=[None, "capitals"] * 3)
    agree(*made)
    plain, adapted = made[1][5], made[1][11]
    assert plain["meta_info"]["output_token_logprobs"] != adapted["meta_info"]["output_token_logprobs"]
    for a, b in zip(*(answers[:6] for answers in made), strict=True):
        mine, other = (
            torch.tensor([p for p, *_ in x["meta_info"]["input_token_logprobs"][1:]], dtype=torch.float64)
            for x in (a, b)
        )
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)
    assert any(padded for mode, _, padded in steps if mode == "prefill")


@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-next", "gpt-oss"])
def test_latents_states_windows_and_experts(model: str, steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's case of chunked prompts, whose answers it has from elsewhere."""
    monkeypatch.setattr(FakeGpuBackend, "config_defaults", lambda self, ctx: {"prefill_graph_tokens": 80})
    backend = FakeGpuBackend()
    suite = Suite(backend, backend.probe()[0], num_threads=1, kernels=[])
    ((case, dtype),) = [
        (case, dtype) for case, dtype in suite.select([f"e2e.{model}[chunked prefill"]) if dtype == torch.float32
    ]
    judged = suite.judge(case, dtype)
    suite.close()
    assert judged.verdict is Verdict.REFERENCE, judged.reason
    assert sum(padded and mode == "prefill" for mode, _, padded in steps) > 2


def test_a_graph_a_bucket_and_all_of_them_before_the_first_request(fake_gpu: FakeGpu) -> None:
    with Engine(device="fakegpu", prefill_graph_tokens=MOST, **SETTINGS) as engine:
        driver = fake_gpu().driver
        assert len(driver.graphs) == FORWARDS + SAMPLINGS
        for length in (1, 2, 20, 40, 41):
            engine.generate(input_ids=prompts(length), sampling_params={"temperature": 0, "max_new_tokens": 3})
        assert len(driver.graphs) == FORWARDS + SAMPLINGS
        assert engine.stats()["eager_steps"] == 1


def test_padding_writes_to_scratch_alone(fake_gpu: FakeGpu) -> None:
    pools = []
    for tokens in (0, MOST):
        with Engine(device="fakegpu", prefill_graph_tokens=tokens, **SETTINGS) as engine:
            for pool in fake_gpu().pools:
                for leaf in pool.leaves:
                    leaf.fill_(7.0)
            answers(engine, prompts(17, 3, 30), max_new_tokens=2)
            pools.append([leaf.clone() for pool in fake_gpu().pools for leaf in pool.leaves])
    for with_graphs, without in zip(*reversed(pools), strict=True):
        torch.testing.assert_close(with_graphs[1:], without[1:], rtol=0, atol=2e-5)
        assert (with_graphs[1:] == 7).flatten(1).all(1).any()  # pages that nobody has


def test_a_device_that_captures_no_prefills_says_so() -> None:
    with pytest.raises(ConfigError, match=r"prefill_graph_tokens=32: device cpu:0 captures no steps with prefill"):
        Engine(device="cpu", prefill_graph_tokens=32, **SETTINGS)


def test_sizes_are_as_close_as_padding_costs() -> None:
    assert token_sizes(256) == [16, 32, 64, 96, 128, 160, 192, 224, 256]
    for largest in (1, 16, 17, 100, 512, 1000, 2048):
        sizes = token_sizes(largest)
        assert sizes[-1] == largest and sizes == sorted(set(sizes))
        assert all(b <= a + 32 or b <= a * 1.13 for a, b in itertools.pairwise(sizes))
