"""Shared-memory collectives against gloo's, on this host, in one run.

    python benchmarks/xeon/collectives.py [--ranks 2] [--rounds 200]

Every rank is a process on a core of its own. Both groups live in the same processes, and a round times one call of each, in turn; the time of
a call is the slowest rank's, measured from a barrier. Medians, and the best in parentheses.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZES = (
    2 << 10,
    16 << 10,
    64 << 10,
    256 << 10,
    1 << 20,
    4 << 20,
)  # bytes of bfloat16; a decode step of 8 x 1024 is 16 KB
TIMEOUT = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return run_rank(args.rank, args.ranks, args.store, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        common = ["--ranks", str(args.ranks), "--rounds", str(args.rounds), "--store", store]
        children = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(rank), *common], env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            for rank in range(args.ranks)
        ]
        if any(child.wait(20 * TIMEOUT) != 0 for child in children):
            raise SystemExit("a rank failed; its error is above")


def run_rank(rank: int, size: int, path: str, rounds: int) -> None:
    from sglang_xeon.collectives import meet

    from sglang_core.api import TorchCommunicator

    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[rank % len(cpus)]})
    store = dist.FileStore(path, size)  # type: ignore[attr-defined]
    shared = meet(range(size), rank, store, TIMEOUT)
    assert shared is not None, "the ranks share no memory; see the log"
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    gloo = TorchCommunicator(dist.new_group(list(range(size))), range(size), rank)
    if rank == 0:
        print(f"{size} ranks, µs: median (best)\n{'':12}{'bytes':>9}{'gloo':>18}{'shared memory':>18}{'ratio':>8}")
    for name in ("all_reduce", "all_gather"):
        for nbytes in SIZES:
            x = torch.ones(nbytes // 2, dtype=torch.bfloat16)
            calls = {"gloo": partial(getattr(gloo, name), x), "shared": partial(getattr(shared, name), x)}
            times = measure(calls, shared, rounds)
            if rank == 0:
                shown = [f"{statistics.median(t) * 1e6:.0f} ({min(t) * 1e6:.0f})" for t in times.values()]
                ratio = statistics.median(times["gloo"]) / statistics.median(times["shared"])
                print(f"{name:12}{nbytes:9}{shown[0]:>18}{shown[1]:>18}{ratio:8.1f}", flush=True)


def measure(calls: dict[str, Callable[[], Any]], group: Any, rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, over all ranks the slowest."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 3):
        for name, call in calls.items():
            group.barrier()
            started = time.perf_counter()
            call()
            if i >= 3:
                times[name].append(time.perf_counter() - started)
    for name, own in times.items():
        slowest = group.all_gather(torch.tensor([own], dtype=torch.float64), dim=0).amax(0)
        times[name] = slowest.tolist()
    return times


if __name__ == "__main__":
    main()
