"""The engine's own tests, once more on the device that checks every rule of a step: traced, padded, poisoned, and moved about."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_core import Engine
from tests.engine.test_engine import (
    test_bias_forces_a_token_and_min_new_tokens_keeps_the_answer_open,
    test_greedy_tokens_are_those_of_transformers,
    test_leaving_a_stream_aborts_its_request,
    test_logprob_start_len_gives_the_tail_even_on_a_cached_prefix,
    test_logprobs_of_input_and_output_are_those_of_transformers,
    test_penalties_forbid_repetition,
    test_stop_strings_end_the_answer_and_its_tokens,
    test_streaming_grows_to_the_whole_answer,
    test_the_second_time_a_prompt_comes_from_the_cache,
)

__all__ = [
    "test_bias_forces_a_token_and_min_new_tokens_keeps_the_answer_open",
    "test_greedy_tokens_are_those_of_transformers",
    "test_leaving_a_stream_aborts_its_request",
    "test_logprob_start_len_gives_the_tail_even_on_a_cached_prefix",
    "test_logprobs_of_input_and_output_are_those_of_transformers",
    "test_penalties_forbid_repetition",
    "test_stop_strings_end_the_answer_and_its_tokens",
    "test_streaming_grows_to_the_whole_answer",
    "test_the_second_time_a_prompt_comes_from_the_cache",
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Takes the place of the reference backend's. Few buckets of few pages, as each is traced."""
    with Engine(
        model_path="demo",
        device="strict",
        dtype="float32",
        in_process=True,
        max_running_requests=4,
        chunked_prefill_size=64,
        context_length=128,
        page_size=16,
        max_total_tokens=1024,
    ) as engine:
        yield engine


def test_sampling_parameters_do_not_run_out_of_buckets(engine: Engine) -> None:
    """Bounds that join the compile key come in few values: every request has its own top-k, penalties and log-probabilities."""
    base = {"max_new_tokens": 4, "ignore_eos": True}
    asked = [base | {"top_k": k, "temperature": 0.8} for k in (2, 3, 5, 9, 17, 60, 100, 900)]
    asked += [base | {"frequency_penalty": 0.1 * i} for i in range(1, 5)]
    asked += [base | {"temperature": 0.7, "top_p": 0.5, "repetition_penalty": 1.5}, base | {"temperature": 0}]
    for i, sampling in enumerate(asked):
        answers = engine.generate(["One", "Two two"], sampling, return_logprob=i % 3 == 0, top_logprobs_num=i)
        assert [len(answer["output_ids"]) for answer in answers] == [4, 4]
