"""A decode step of latent attention: in latent space, and with keys and values expanded from all cached latents in every step.

DeepSeek-V2-Lite's shape, cut to a few layers, on the reference bodies. One model; the same plans are made under either rule, turn
and turn about, so that drift of the machine meets both alike. Given are whole steps (experts and head included), and the attention
layers alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from steps import open_shape

from sglang_core.bench.step import StepShape
from sglang_core.layers.mla import LatentAttention
from sglang_core.ops import mla

RULES: dict[str, Callable[..., Any]] = {
    "absorbed": lambda spec, batch: np.zeros(batch.num_reqs, bool),
    "expanded": lambda spec, batch: np.ones(batch.num_reqs, bool),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    step = StepShape.decode(args.batch_size, args.context)
    changes = {"num_hidden_layers": args.num_layers}
    rank, driver = open_shape("deepseek-v2-lite", step, device=args.device, dtype=args.dtype, changes=changes)
    attention = [0.0]
    for module in rank.model.modules():
        if isinstance(module, LatentAttention):
            module.forward = timed(module.forward, attention)  # type: ignore[method-assign]
    whole: dict[str, list[float]] = {name: [] for name in RULES}
    alone: dict[str, list[float]] = {name: [] for name in RULES}
    for run in range(args.runs + 1):  # the first is not counted
        for name, rule in RULES.items():
            with decided_by(rule):
                attention[0] = 0.0
                seconds = driver.run(step)
            if run:
                whole[name].append(seconds)
                alone[name].append(attention[0])
    print(
        f"deepseek-v2-lite, {args.num_layers} layers, context {args.context}, batch {args.batch_size}, {args.dtype}, medians"
    )
    for what, times in (("whole step", whole), ("attention layers", alone)):
        absorbed, expanded = (statistics.median(times[name]) for name in RULES)
        print(
            f"{what:17} absorbed {absorbed * 1e3:8.1f} ms   expanded {expanded * 1e3:8.1f} ms   {expanded / absorbed:.2f}x"
        )


def timed(fn: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """fn, adding what its calls take to seconds[0]. A host device: a call returns when it is done."""

    def run(*args: Any) -> Any:
        started = time.perf_counter()
        out = fn(*args)
        seconds[0] += time.perf_counter() - started
        return out

    return run


@contextmanager
def decided_by(rule: Callable[..., Any]) -> Any:
    before, mla.is_expanded = mla.is_expanded, rule
    try:
        yield
    finally:
        mla.is_expanded = before


if __name__ == "__main__":
    main()
