"""How a child engine is spoken to: a JSON line a question on stdin, a JSON line an answer. Standard library only.

A child runs in its engine's own virtual environment, so nothing of this project may be imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

Ids = list[list[int]]


class PeerEngine(Protocol):
    """What a child makes of its engine. Greedy, end-of-sequence ignored."""

    def generate(self, ids: Ids, lengths: list[int]) -> tuple[Ids, int]:
        """Answers `ids[i]` with exactly `lengths[i]` tokens, all at once. -> (tokens, prompt tokens served from a cache)."""

    def close(self) -> None: ...


def serve(make: Callable[[dict[str, Any]], PeerEngine]) -> None:
    """Make the engine from the job on the first line, say that it is ready, and answer until stdin ends.

    Whatever the engine prints goes to stderr. An answer has `seconds`, measured here around the engine's own call.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = make(json.loads(sys.stdin.readline()))
    try:
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            print(json.dumps(_answer(engine, json.loads(line))), file=answers)
    finally:
        engine.close()


def _answer(engine: PeerEngine, question: dict[str, Any]) -> dict[str, Any]:
    try:
        if "score" in question:
            return {"regrets": engine.regrets(question["score"], question["num_prompt_tokens"])}  # type: ignore[attr-defined]
        started = time.perf_counter()
        tokens, cached = engine.generate(question["ids"], question["lengths"])
        seconds = time.perf_counter() - started
        if [len(row) for row in tokens] != question["lengths"]:
            return {"error": f"wanted {question['lengths']} tokens, got {[len(row) for row in tokens]}"}
        return {"seconds": seconds, "tokens": tokens, "cached": cached}
    except Exception:
        return {"error": traceback.format_exc()}
