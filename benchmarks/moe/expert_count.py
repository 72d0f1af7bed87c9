"""What more experts cost a decode step that visits as many of them: the whole step of a model, batch 1.

Qwen3-30B-A3B's shape, cut to a few layers, with a share of its experts and with all, at the same top-k: the same arithmetic, and
weights that are spread over more memory. Both models are held at once and stepped turn and turn about.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from steps import open_shape

from sglang_core.bench.step import StepShape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16, help="of the smaller model; the larger has 8 times as many")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--runs", type=int, default=50)
    args = parser.parse_args()

    torch.manual_seed(0)
    step = StepShape.decode(args.batch_size, args.context)
    drivers = {}
    for experts in (args.experts, 8 * args.experts):
        changes = {
            "num_hidden_layers": args.num_layers,
            "num_experts": experts,
            "num_experts_per_tok": args.top_k,
        }
        _, drivers[experts] = open_shape("qwen3-30b-a3b", step, device=args.device, dtype=args.dtype, changes=changes)
    times: dict[int, list[float]] = {experts: [] for experts in drivers}
    for run in range(args.runs + 3):  # the first three are not counted
        for experts, driver in drivers.items():
            seconds = driver.run(step)
            if run >= 3:
                times[experts].append(seconds)
    few, many = (statistics.median(seconds) for seconds in times.values())
    print(
        f"qwen3-30b-a3b, {args.num_layers} layers, top {args.top_k}, batch {args.batch_size}, context {args.context}, "
        f"{args.dtype}, medians of {args.runs}"
    )
    for experts, seconds in times.items():
        print(f"{experts:4} experts {statistics.median(seconds) * 1e3:8.2f} ms a decode step")
    print(f"8x the experts: {many / few:.2f}x the time")


if __name__ == "__main__":
    main()
