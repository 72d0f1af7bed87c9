"""What a decode step costs besides its kernels: what runs between them, and between two steps.

    python benchmarks/xeon/host_overhead.py [--shape qwen3-0.6b] [--batch 8] [--length 128] [--steps 30] [--rounds 3]

Two copies of the model take turns: one whose steps are replayed (`sglang_xeon/step_graph.py`), one that calls every op, as it is for
`profile`. Steps follow each other as in the engine, the next one launched while one runs. Of a replayed step the time in its tapes is that of
kernels; what is left of it, and the gap before the next step begins, is time in which none runs. `launch` is beside a running step:
it is CPU time, taken from the kernels where they have every core. Medians; also the best step of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from sglang_xeon.step_graph import RECORD_AT, Tape

from sglang_core.bench.step import StepDriver, StepShape, open_rank
from sglang_core.config import EngineConfig

CONFIGS = Path(__file__).parents[1] / "configs"
WARM_UP = RECORD_AT + 3


class Steps:
    """The steps of one copy of the model, timed on its stream. Seconds by name, an entry a step."""

    def __init__(self, config: dict[str, Any], shape: StepShape, *, watched: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            engine = EngineConfig.from_flat(
                model_path=folder,
                device="xeon",
                dtype="bfloat16",
                load_format="dummy",
                skip_tokenizer_init=True,
                chunked_prefill_size=64,
            )
            rank = open_rank(engine, [shape], (lambda bound: bound) if watched else None)
        self.driver, self.runner, self.shape = StepDriver.of(rank), rank.runner, shape
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.in_tapes = self.ended = 0.0
        self._run, self.runner._run = self.runner._run, self._timed  # type: ignore[method-assign]
        self.measure(WARM_UP)
        self.seconds.clear()

    def _timed(self, *args: Any) -> Any:
        started, self.in_tapes = time.perf_counter(), 0.0
        if self.ended:
            self.seconds["between"].append(started - self.ended)
        result = self._run(*args)
        self.ended = time.perf_counter()
        self.seconds["step"].append(self.ended - started)
        self.seconds["inside"].append(self.ended - started - self.in_tapes)
        return result

    def measure(self, steps: int) -> None:
        replay, self.ended = Tape.replay, 0.0

        def timed(tape: Tape, **options: Any) -> Any:
            started = time.perf_counter()
            result = replay(tape, **options)
            self.in_tapes += time.perf_counter() - started
            return result

        Tape.replay = timed  # type: ignore[method-assign]
        plans = [self.driver.plan(self.shape) for _ in range(steps)]
        before = self._launch(plans[0])
        for plan in plans[1:]:
            pending = self._launch(plan)
            before.result()
            before = pending
        before.result()
        Tape.replay = replay  # type: ignore[method-assign]

    def _launch(self, plan: Any) -> Any:
        started = time.thread_time()
        pending = self.runner.launch(plan)
        self.seconds["launch"].append(time.thread_time() - started)
        return pending


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = json.loads((CONFIGS / f"{args.shape}.json").read_text())
    shape = StepShape.decode(args.batch, args.length)
    replayed, eager = (Steps(config, shape, watched=watched) for watched in (False, True))
    for _ in range(args.rounds):
        replayed.measure(args.steps)
        eager.measure(args.steps)
    medians = {name: statistics.median(seconds) for name, seconds in replayed.seconds.items()}
    facts = {
        "replayed_ms": medians["step"] * 1e3,
        "replayed_best_ms": min(replayed.seconds["step"]) * 1e3,
        "eager_ms": statistics.median(eager.seconds["step"]) * 1e3,
        "eager_best_ms": min(eager.seconds["step"]) * 1e3,
        "inside_us": medians["inside"] * 1e6,
        "between_us": medians["between"] * 1e6,
        "launch_us": medians["launch"] * 1e6,
        "share": (medians["inside"] + medians["between"]) / (medians["step"] + medians["between"]),
    }
    for name, value in facts.items():
        print(f"{name:16} {value:10.4g}")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
