"""The engine on steps that XLA compiles: tokens are the reference's, and nothing is compiled for a req."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

jax = pytest.importorskip("jax")

from sglang_tpu import attention, step  # noqa: E402

from sglang_core import Engine  # noqa: E402

PROMPTS = ["The capital of France is", "One, two, three", "x", "Hello! How are you today?"]
SETTINGS: dict[str, Any] = {
    "model_path": "demo",
    "dtype": "float32",
    "in_process": True,
    "max_running_requests": 3,
    "context_length": 64,
    "chunked_prefill_size": 16,
    "max_total_tokens": 96,
}
GREEDY = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}
ASKED: list[dict[str, Any]] = [
    GREEDY,
    GREEDY | {"frequency_penalty": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 7, "max_new_tokens": 8, "ignore_eos": True},
]


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Engine]]:
    with Engine(device="cpu", **SETTINGS) as reference, Engine(device="tpu:cpu", **SETTINGS) as compiled:
        yield [reference, compiled]


@pytest.mark.parametrize("asked", ASKED, ids=["greedy", "penalty", "sampled"])
def test_tokens_are_those_of_the_reference(engines: list[Engine], asked: dict[str, Any]) -> None:
    """Twice: the second time prefixes come from the cache."""
    for _ in range(2):
        expected, made = ([a["output_ids"] for a in engine.generate(PROMPTS, asked)] for engine in engines)
        assert made == expected


def test_log_probabilities_are_those_of_the_reference(engines: list[Engine]) -> None:
    asked = {"return_logprob": True, "top_logprobs_num": 3, "logprob_start_len": 0}
    expected, made = (engine.generate(PROMPTS[:2], GREEDY, **asked) for engine in engines)
    for a, b in zip(expected, made, strict=True):
        for part in ("input_token_logprobs", "output_token_logprobs"):
            x, y = a["meta_info"][part], b["meta_info"][part]
            assert [t[1] for t in x] == [t[1] for t in y]
            assert [t[0] for t in x if t[0] is not None] == pytest.approx(
                [t[0] for t in y if t[0] is not None], abs=1e-4
            )


def test_serving_compiles_no_forward_step(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    make = step.Program.__init__
    monkeypatch.setattr(
        step.Program, "__init__", lambda self, fn, *args: (compiled.append(fn.__name__), make(self, fn, *args))[1]
    )
    late = engines[1].stats()["late_compiles"]
    engines[1].generate([p * 2 for p in PROMPTS], GREEDY)
    assert "_forward_step" not in compiled
    assert engines[1].stats()["late_compiles"] - late == len(compiled)
    assert "late_compiles" not in engines[0].stats()


def test_watched_steps_call_every_op(engines: list[Engine], caplog: pytest.LogCaptureFixture) -> None:
    """Kernels are compared with their bodies, which a compiled step would not call."""
    with caplog.at_level("INFO"), Engine(device="tpu:cpu", verify_kernels=1.0, **SETTINGS) as watched:
        asked = GREEDY | {"max_new_tokens": 3}
        expected, made = (engine.generate(PROMPTS[0], asked)["output_ids"] for engine in (engines[0], watched))
        assert made == expected
        assert watched.stats()["verify_failures"] == 0
    assert "norm.rms" in caplog.text


def test_watched_steps_see_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    facts_of = attention.facts_of
    monkeypatch.setattr(attention, "facts_of", lambda spec, *a, **kw: facts_of(replace(spec, scale=0.2), *a, **kw))
    with Engine(device="tpu:cpu", verify_kernels=1.0, **SETTINGS) as watched:
        watched.generate(PROMPTS[0], GREEDY | {"max_new_tokens": 1})
        assert watched.stats()["verify_failures"] > 0
