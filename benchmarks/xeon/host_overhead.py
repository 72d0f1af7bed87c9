"""What a decode step costs besides its kernels: Python, dispatch, the step's layout.

    python benchmarks/xeon/host_overhead.py [--shape qwen3-0.6b] [--batch 8] [--length 128] [--steps 200]

The same model with its widths cut to almost nothing has as many layers, ops and modules, and kernels that take no time: the CPU time of its step is
the overhead of the real one, or a little more. Two threads carry it: `stream` runs the step, and what it spends there is time in which no kernel
runs; `launch` lays the next step out, beside a step that is running. The share is stream's overhead of the real shape's step. CPU
time on one thread, so that a busy machine changes little; the best and the median of the steps are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_core.bench.step import StepDriver, StepShape, open_rank
from sglang_core.config import EngineConfig

CONFIGS = Path(__file__).parents[1] / "configs"
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
}
TIMED_THREADS = 1  # a team of one has nobody to wait for, so CPU time is work


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Seconds: CPU of each step on the stream's thread and on the caller's, and wall time."""

    stream: list[float]
    launch: list[float]
    wall: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--real-steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = json.loads((CONFIGS / f"{args.shape}.json").read_text())
    shape = StepShape.decode(args.batch, args.length)
    narrow = measure(config | {k: v for k, v in NARROW.items() if k in config}, shape, args.steps, TIMED_THREADS)
    real = measure(config, shape, args.real_steps, None)
    step, overhead = statistics.median(real.wall), statistics.median(narrow.stream)
    facts = {
        "stream_us": overhead * 1e6,
        "stream_best_us": min(narrow.stream) * 1e6,
        "launch_us": statistics.median(narrow.launch) * 1e6,
        "launch_best_us": min(narrow.launch) * 1e6,
        "real_step_ms": step * 1e3,
        "share": overhead / step,
        "share_best": min(narrow.stream) / min(real.wall),
    }
    for name, value in facts.items():
        print(f"{name:15} {value:10.4g}")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def measure(config: dict[str, Any], shape: StepShape, steps: int, num_threads: int | None) -> StepCost:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        engine = EngineConfig.from_flat(
            model_path=folder,
            device="xeon",
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            num_threads=num_threads,
        )
        rank = open_rank(engine, [shape])
    driver, stream = StepDriver.of(rank), rank.runner._stream  # its thread's clock is what is wanted
    cost = StepCost(stream=[], launch=[], wall=[])
    for _ in range(10):
        driver.run(shape)
    for _ in range(steps):
        plan = driver.plan(shape)
        before, started, launched = stream.submit(time.thread_time).result(), time.perf_counter(), time.thread_time()
        pending = rank.runner.launch(plan)
        cost.launch.append(time.thread_time() - launched)
        pending.result()
        cost.wall.append(time.perf_counter() - started)
        cost.stream.append(stream.submit(time.thread_time).result() - before)
    rank.runner.close()
    return cost


if __name__ == "__main__":
    main()
