"""What loading and swapping adapters does to others: inter-token latency of streams while adapters come and go, and while nothing does.

    python benchmarks/lora/swap_latency.py [--device D] [--shape qwen3-0.6b] [--rounds 5]

One engine, a few streams without an adapter that never stop. Quiet and busy spells of equal length alternate. In a busy spell, every
`--period` seconds, an adapter is loaded from disk and unloaded again, and two requests of one token name adapters that take turns in
a single slot: each is written into it anew. What such a request computes itself is work that any request brings, so the quiet spells
have the same requests, with an adapter that stays in its slot. p50 and p99 of the gaps between tokens, and busy / quiet.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from random_adapters import write_adapters
from shapes import DEFAULT_SHAPE, dummy_engine_settings, model_folder, save

from sglang_core import Engine

TINY = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}


class Stream(threading.Thread):
    """A request that goes on until told to stop, and when each of its tokens came."""

    def __init__(self, engine: Engine, first: int, output_len: int) -> None:
        super().__init__(daemon=True)
        self.engine, self.first, self.output_len = engine, first, output_len
        self.times: list[float] = []
        self.is_over = False

    def run(self) -> None:
        params = {"temperature": 0, "max_new_tokens": self.output_len, "ignore_eos": True}
        while not self.is_over:
            for _ in self.engine.generate(input_ids=[self.first, 2, 3, 4], sampling_params=params, stream=True):
                self.times.append(time.perf_counter())
                if self.is_over:
                    return

    def gaps(self, start: float, stop: float) -> list[float]:
        inside = [t for t in self.times if start <= t < stop]
        return [b - a for a, b in itertools.pairwise(inside)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", default=DEFAULT_SHAPE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a spell")
    parser.add_argument("--period", type=float, default=1.0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with model_folder(args.shape) as folder, tempfile.TemporaryDirectory() as adapters:
        paths = write_adapters(Path(folder) / "config.json", Path(adapters), count=4, rank=args.rank)
        stays, coming = paths.pop("a2"), paths.pop("a3")
        settings = dummy_engine_settings(folder, args.device) | {
            "lora_paths": paths,
            "max_loras_per_batch": 1,
            "max_total_tokens": 16_384,
            "disable_radix_cache": True,
        }
        with Engine(**settings) as engine:
            engine.load_lora_adapter("stays", stays)
            streams = [Stream(engine, 1 + i, output_len=1500) for i in range(args.streams)]
            for stream in streams:
                stream.start()
            time.sleep(args.seconds / 4)
            spells: dict[str, list[float]] = {"quiet": [], "busy": []}
            writes = 0.0
            for _ in range(args.rounds):
                for name, gaps in spells.items():
                    before = engine.stats()["lora_slot_writes"]
                    start = time.perf_counter()
                    spell(engine, args.seconds, args.period, coming if name == "busy" else None)
                    for stream in streams:
                        gaps += stream.gaps(start, time.perf_counter())
                    writes += engine.stats()["lora_slot_writes"] - before
            for stream in streams:
                stream.is_over = True
            for stream in streams:
                stream.join()
            title = f"{args.shape} on {engine.info.device}, {args.streams} streams, {writes:.0f} slots written"
    print(title)
    facts: dict[str, Any] = {name: percentiles(gaps) for name, gaps in spells.items()}
    for name, (p50, p99) in facts.items():
        print(f"  {name:<6} p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, of {len(spells[name])} gaps")
    facts["p99 busy / quiet"] = facts["busy"][1] / facts["quiet"][1]
    print(f"  p99 busy / quiet: {facts['p99 busy / quiet']:.3f}")
    save(args.json, facts)


def spell(engine: Engine, seconds: float, period: float, coming: str | None) -> None:
    """`coming`: the folder of an adapter that comes and goes; None is a quiet spell."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        for name in ("a0", "a1") if coming else ("stays", "stays"):
            engine.generate(input_ids=[5, 6, 7, 8], sampling_params=TINY, lora_path=name)
        if coming:
            engine.load_lora_adapter("coming", coming)
            engine.unload_lora_adapter("coming")
        time.sleep(max(0.0, period - (time.perf_counter() - started)))


def percentiles(gaps: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(gaps, n=100)
    return cuts[49], cuts[98]


if __name__ == "__main__":
    main()
