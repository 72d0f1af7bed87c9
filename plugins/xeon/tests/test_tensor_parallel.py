"""Two ranks on this host, through the engine: their collectives are shared memory, and a rank that dies ends the engine."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from sglang_core import Engine

SETTINGS = {
    "model_path": "demo",
    "device": "xeon",
    "dtype": "float32",
    "max_total_tokens": 2048,
    "context_length": 256,
    "num_threads": 1,
    "random_seed": 0,
}
PROMPTS = ["The capital of France is", "One, two, three,"]
GREEDY = {"temperature": 0, "max_new_tokens": 12}


def answers(engine: Engine) -> list[list[int]]:
    return [answer["output_ids"] for answer in engine.generate(PROMPTS, GREEDY)]


def test_two_ranks_in_shared_memory_answer_what_one_does_and_end_together() -> None:
    with Engine(**SETTINGS) as one:
        wanted = answers(one)
    with Engine(**SETTINGS, tp_size=2) as two:
        assert answers(two) == wanted
        pids = two.client._link.pids  # type: ignore[attr-defined]
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
        assert all("memfd:sglang-ranks" in text for text in maps), "the ranks met in shared memory, not over gloo"
        os.kill(pids[1], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while two.client.is_alive and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not two.client.is_alive
