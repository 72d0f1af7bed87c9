"""The step loop: a step that fails ends every request once and the engine with it; a loop that runs says so."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest

from sglang_core import Engine
from sglang_core.engine.core import EngineCore
from sglang_core.errors import EngineDeadError
from sglang_core.runner.model_runner import ModelRunner
from sglang_core.types import Control, FromEngine, OutputBatch, ToEngine

SETTINGS: dict[str, Any] = {
    "model_path": "demo",
    "device": "cpu",
    "dtype": "float32",
    "in_process": True,
    "max_total_tokens": 2048,
}


@pytest.mark.parametrize("where", ["launch", "_forward_step"])  # on the host, and on the device
def test_a_failing_step_ends_every_request_once(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = getattr(ModelRunner, where), Counter[str]()

    def fails_late(*args: Any) -> Any:
        calls[where] += 1
        if calls[where] > 6:
            raise ZeroDivisionError("a kernel broke")
        return real(*args)

    monkeypatch.setattr(ModelRunner, where, fails_late)
    with Engine(**SETTINGS) as engine:
        errors: list[Exception] = []

        def ask() -> None:
            try:
                engine.generate("Hi", {"max_new_tokens": 400, "ignore_eos": True, "n": 2})
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(errors) == 3 and all(isinstance(e, EngineDeadError) for e in errors)
        assert any("a kernel broke" in str(e) for e in errors)
        assert not engine.client.is_alive and not engine.client._answers and not engine.client._groups
        with pytest.raises(EngineDeadError):
            engine.generate("Hi")
        with pytest.raises(EngineDeadError):
            engine.stats()


class End:
    """The engine's end of a channel, with nobody behind it until it is time to stop."""

    def __init__(self, rounds: int) -> None:
        self.sent: list[FromEngine] = []
        self.rounds = rounds

    def receive(self, *, block: bool) -> list[ToEngine]:
        self.rounds -= 1
        return [] if self.rounds else [Control(id=0, action="shutdown")]

    def send(self, message: FromEngine) -> None:
        self.sent.append(message)

    def close(self) -> None:
        return


class Idle:
    has_work = False

    def schedule(self) -> None:
        return None

    def stats(self) -> dict[str, float]:
        return {"running": 0.0}

    def close(self) -> None:
        return


def test_a_loop_with_nothing_to_tell_still_says_that_it_runs() -> None:
    now = iter(range(1000))  # a second a look
    core = EngineCore(
        Idle(),  # type: ignore[arg-type]
        Idle(),  # type: ignore[arg-type]
        eos_ids=frozenset(),
        max_in_flight=1,
        clock=lambda: float(next(now)),
        info={},
    )
    end = End(rounds=9)
    core.run(end)
    signs = [message for message in end.sent if isinstance(message, OutputBatch)]
    assert len(signs) >= 3 and all(sign.outputs == [] and sign.stats == {"running": 0.0} for sign in signs)
