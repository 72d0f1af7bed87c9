"""Whole models through steps that XLA compiles, on one device and over meshes: tokens and log-probabilities are transformers'."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("jax")

from sglang_core import Engine
from tests.models.tiny import NUM_NEW, PROMPT_LENS, Reference, reference

BOUND = 1e-4  # float32 on both sides: only the order of sums differs
CASES = [  # model, --tp-size, --ep-size
    ("llama31", 1, 1),
    ("qwen3-moe", 1, 1),
    ("deepseek-v2-lite", 1, 1),
    ("llama31", 4, 1),
    ("qwen3-moe", 2, 1),
    ("qwen3-moe", 4, 2),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def ready(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Reference]]:
    """Over four ranks two have each KV head, and over two or four the last has fewer rows of the vocabulary."""
    name, tp_size, ep_size = request.param
    ref = reference(name, tmp_path_factory.mktemp(name))
    with Engine(
        model_path=str(ref.folder),
        device="tpu:cpu",
        dtype="float32",
        in_process=True,
        skip_tokenizer_init=True,
        max_running_requests=2,
        context_length=32,
        chunked_prefill_size=16,
        max_total_tokens=128,
        page_size=8,
        tp_size=tp_size,
        ep_size=ep_size,
    ) as engine:
        yield engine, ref


def test_greedy_tokens_are_transformers(ready: tuple[Engine, Reference]) -> None:
    """In chunks, mixed with decodes, and the second time from the cache."""
    engine, ref = ready
    prompts = [tokens[:n] for tokens, n in zip(ref.tokens, PROMPT_LENS, strict=True)]
    asked = {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    for _ in range(2):
        made = [answer["output_ids"] for answer in engine.generate(input_ids=prompts, sampling_params=asked)]
        assert made == [tokens[n:] for tokens, n in zip(ref.tokens, PROMPT_LENS, strict=True)]


def test_log_probabilities_are_transformers(ready: tuple[Engine, Reference]) -> None:
    engine, ref = ready
    tokens, logits = ref.tokens[0], ref.logits[0]
    assert float(logits.std()) > 1  # else they would hardly differ whatever went wrong
    asked = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    (answer,) = engine.generate(input_ids=[tokens], sampling_params=asked, return_logprob=True, logprob_start_len=0)
    ours = torch.tensor([value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]])
    assert float((ours - chosen(logits, tokens)).abs().max()) < BOUND


def chosen(logits: Tensor, tokens: list[int]) -> Tensor:
    """logits: [T, V] -> [T - 1], of each token after the first."""
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
