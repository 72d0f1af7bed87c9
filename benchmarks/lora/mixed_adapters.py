"""What many adapters in one batch cost: tokens/s of 32 requests with 16 adapters between them, with one for all, and with none.

    python benchmarks/lora/mixed_adapters.py [--device D] [--shape qwen3-0.6b] [--runs 5]

One engine with room for 16 adapters; the three workloads alternate in each round, the ratio is taken within a round, and its median is
reported. Prompts are random and short, so that the time is that of decoding; the prefix cache is off.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from random_adapters import write_adapters
from shapes import DEFAULT_SHAPE, dummy_engine_settings, model_folder, save, spread

from sglang_core import Engine
from sglang_core.bench.workload import random_ids

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", default=DEFAULT_SHAPE)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with model_folder(args.shape) as folder, tempfile.TemporaryDirectory() as adapters:
        paths = write_adapters(Path(folder) / "config.json", Path(adapters), count=args.adapters, rank=args.rank)
        settings = dummy_engine_settings(folder, args.device) | {
            "lora_paths": paths,
            "max_loras_per_batch": args.adapters,
            "max_total_tokens": args.batch_size * (args.input_len + args.output_len + 32),
            "disable_radix_cache": True,
        }
        names = list(paths)
        mixes: dict[str, list[str | None]] = {
            "mixed": [names[i % len(names)] for i in range(args.batch_size)],
            "one": [names[0]] * args.batch_size,
            "none": [None] * args.batch_size,
        }
        with Engine(**settings) as engine:
            for mix in mixes.values():
                run(engine, mix, args.input_len, 4)  # every adapter in its slot
            rounds = [
                {name: run(engine, mix, args.input_len, args.output_len) for name, mix in mixes.items()}
                for _ in range(args.runs)
            ]
            title = f"{args.shape} on {engine.info.device}, {args.batch_size} requests, {args.adapters} adapters of rank {args.rank}"
    print(title)
    facts = {"rounds": rounds}
    for name in mixes:
        print(f"  {name:<6} {spread([each[name] for each in rounds])} tokens/s")
    for over in ("one", "none"):
        ratios = [each["mixed"] / each[over] for each in rounds]
        facts[f"mixed / {over}"] = statistics.median(ratios)
        print(f"  mixed / {over}: {spread(ratios)}")
    save(args.json, facts)


def run(engine: Engine, adapters: list[str | None], input_len: int, output_len: int) -> float:
    """-> output tokens a second, all requests at once."""
    prompts = random_ids(
        len(adapters), input_len=input_len, output_len=output_len, vocab_size=engine.info.vocab_size, seed=SEED
    )
    params = {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}
    started = time.perf_counter()
    engine.generate(input_ids=[p.input_ids for p in prompts], sampling_params=params, lora_path=adapters)
    return len(adapters) * output_len / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
