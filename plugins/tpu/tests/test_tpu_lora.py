"""Adapters on steps that XLA compiles: a slot that is written between steps is what the next one reads."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("jax")

from sglang_core import Engine

SETTINGS: dict[str, Any] = {
    "model_path": "demo",
    "dtype": "float32",
    "in_process": True,
    "enable_lora": True,
    "lora_target_modules": ("all", "embed_tokens", "lm_head"),
    "max_lora_rank": 16,
    "max_running_requests": 2,
    "context_length": 64,
    "chunked_prefill_size": 16,
    "max_total_tokens": 96,
}
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
PROMPTS = ["The capital of France is", "x"]


def answers(device: str, **more: Any) -> tuple[list[list[int]], list[list[int]]]:
    """-> greedy tokens before an adapter is loaded, and then with it for the first prompt alone."""
    with Engine(device=device, **SETTINGS, **more) as engine:
        plain = [a["output_ids"] for a in engine.generate(PROMPTS, GREEDY)]
        engine.load_lora_adapter("capitals", "demo:capitals")
        return plain, [a["output_ids"] for a in engine.generate(PROMPTS, GREEDY, lora_path=["capitals", None])]


@pytest.fixture(scope="module")
def expected() -> tuple[list[list[int]], list[list[int]]]:
    plain, mixed = answers("cpu")
    assert mixed[0] != plain[0] and mixed[1] == plain[1]
    return plain, mixed


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_adapter_changes_the_tokens_of_its_req_only(tp_size: int, expected: Any) -> None:
    """It is loaded while the engine runs; of two ranks each takes its part."""
    assert answers("tpu:cpu", tp_size=tp_size) == expected
