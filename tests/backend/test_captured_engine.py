"""The engine on a device that captures its steps and replays them: the tokens of the reference backend."""

from __future__ import annotations

import pytest

from sglang_core import Engine
from tests.backend.conftest import Install

PROMPTS = ["The capital of France is", "One, two, three", "x", "Hello! How are you today?"]
SETTINGS = {
    "model_path": "demo",
    "dtype": "float32",
    "in_process": True,
    "max_running_requests": 3,
    "context_length": 64,
}


@pytest.mark.parametrize("backend", ["CapturingBackend", "DecodeCapturingBackend"])
def test_an_engine_replays_captured_steps(install: Install, backend: str) -> None:
    """Prefill and decode in turn, penalties, a prefix from the cache, retraction: two buckets, each captured once.

    The second backend captures decode only, and runs what is longer as it is.
    """
    install(
        "sglang-capturing",
        entry_points={"sglang_core.backends": {"capturing": f"tests.conformance.capturing:{backend}"}},
        modules={},
    )
    asked = [
        {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True},
        {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True, "frequency_penalty": 1.0},
    ]
    made = []
    for device in ("cpu", "capturing"):
        with Engine(device=device, chunked_prefill_size=16, max_total_tokens=96, **SETTINGS) as engine:
            made.append([[a["output_ids"] for a in engine.generate(PROMPTS, sampling)] for sampling in asked * 2])
            stats = engine.stats()
    assert stats["late_compiles"] > 0  # what penalties need is captured once a req asks for them
    assert made[0] == made[1]
