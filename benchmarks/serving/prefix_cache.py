"""What the radix cache gives, and what it costs: requests/s with the cache on and off, alternating in one run.

    python benchmarks/serving/prefix_cache.py [--device D] [--shape qwen3-0.6b] [--runs 3] [--only random-ids]

Two engines with the same random weights live side by side, one of them with --disable-radix-cache. Each round runs the
same workload on both, one after the other, with the cache emptied before; the ratio is taken within a round, and its
median is reported. Which engine was made first matters by a few percent, so `--runs` rounds are run with either made first,
and the median is over all of them. Shared prefix: 32 requests at once, 1024 tokens in common and 32 of their own, 16 out. No
prefix in common: 32 requests of 256 random tokens, 32 out.
"""

from __future__ import annotations

import argparse
import statistics

from shapes import DEFAULT_SHAPE, dummy_engine_settings, model_folder, save, spread

from sglang_core import Engine
from sglang_core.bench.offline import OfflineRun, run_offline
from sglang_core.bench.workload import Prompt, random_ids, shared_prefix

SEED = 0
NUM_REQUESTS = 32
POOL_TOKENS = 40_960
PREFIX, SUFFIX, SHORT_OUTPUT = 1024, 32, 16
RANDOM_INPUT, RANDOM_OUTPUT = 256, 32
WORKLOADS = ("shared-prefix", "random-ids")

Pair = tuple[OfflineRun, OfflineRun]  # cache on, cache off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", default=DEFAULT_SHAPE)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--num-requests", type=int, default=NUM_REQUESTS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--only", choices=WORKLOADS)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    pairs: dict[str, list[Pair]] = {name: [] for name in WORKLOADS if args.only in (None, name)}
    with model_folder(args.shape) as folder:
        settings = dummy_engine_settings(folder, args.device) | {"dtype": args.dtype, "max_total_tokens": POOL_TOKENS}
        for first_has_cache in (True, False):
            with (
                Engine(**settings, disable_radix_cache=not first_has_cache) as first,
                Engine(**settings, disable_radix_cache=first_has_cache) as second,
            ):
                on, off = (first, second) if first_has_cache else (second, first)
                print(
                    f"{args.shape} on {on.info.device}, {args.num_requests} requests at once, {args.runs} rounds;"
                    f" made first: cache {'on' if first_has_cache else 'off'}",
                    flush=True,
                )
                for name, prompts in workloads(args.num_requests, on.info.vocab_size).items():
                    if name in pairs:
                        pairs[name] += compare(name, on, off, prompts, args.runs)
    save(args.json, {name: summary(name, of_name) for name, of_name in pairs.items()})


def workloads(count: int, vocab_size: int) -> dict[str, list[Prompt]]:
    return {
        "shared-prefix": shared_prefix(
            count,
            groups=1,
            prefix_len=PREFIX,
            suffix_len=SUFFIX,
            output_len=SHORT_OUTPUT,
            vocab_size=vocab_size,
            seed=SEED,
        ),
        "random-ids": random_ids(
            count, input_len=RANDOM_INPUT, output_len=RANDOM_OUTPUT, vocab_size=vocab_size, seed=SEED
        ),
    }


def compare(name: str, on: Engine, off: Engine, prompts: list[Prompt], rounds: int) -> list[Pair]:
    """Alternate, the second engine first in every other round, so that a slow drift of the machine favours neither."""
    warm = random_ids(2, input_len=64, output_len=4, seed=SEED + 1)
    for engine in (on, off):
        run_offline(engine, warm)
    pairs: list[Pair] = []
    for i in range(rounds):
        runs = {}
        for engine in (on, off) if i % 2 == 0 else (off, on):
            engine.flush_cache()
            runs[engine] = run_offline(engine, prompts)
        pairs.append((runs[on], runs[off]))
        print(f"  {name}: on / off {ratio(pairs[-1]):.3f}", flush=True)
    return pairs


def ratio(pair: Pair) -> float:
    return pair[0].requests_per_s / pair[1].requests_per_s


def summary(name: str, pairs: list[Pair]) -> dict[str, object]:
    ratios = [ratio(pair) for pair in pairs]
    facts: dict[str, object] = {
        "cached_tokens": min(a.cached_tokens for a, _ in pairs),
        "prompt_tokens": pairs[0][0].prompt_tokens,
        "requests_per_s_on": statistics.median(a.requests_per_s for a, _ in pairs),
        "requests_per_s_off": statistics.median(b.requests_per_s for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    print(f"{name}: {facts['cached_tokens']} of {facts['prompt_tokens']} prompt tokens from cache")
    print(f"  requests/s on  {spread([a.requests_per_s for a, _ in pairs])}")
    print(f"  requests/s off {spread([b.requests_per_s for _, b in pairs])}")
    print(f"  on / off       {spread(ratios)}", flush=True)
    return facts


if __name__ == "__main__":
    main()
