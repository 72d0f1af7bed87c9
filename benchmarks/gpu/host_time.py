"""What a full decode step costs the host on the runtime of GPUs, on a machine without one: planning, laying out and launching, reading results.

    python benchmarks/gpu/host_time.py [--batch 256] [--context 4096] [--steps 200] [--temperature 0.7]

The driver is the host (`tests/backend/fake_driver.py`), and a step computes nothing: what is timed runs beside a GPU's step. CPU time of the engine's thread;
that of copies to a GPU and of its launches is not in it. Medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins/triton/tests/gpu")]

from sglang_core.config import EngineConfig  # noqa: E402
from sglang_core.engine.build import build_engine  # noqa: E402
from sglang_core.runner.model_runner import ModelRunner  # noqa: E402
from sglang_core.runner.sampler import SampleOutput  # noqa: E402
from sglang_core.types import AddReq, SamplingParams  # noqa: E402

PROMPT = 1024


def install_device(folder: Path) -> None:
    """The backend `fakegpu`, by its metadata."""
    info = folder / "sglang_fakegpu-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sglang-fakegpu\nVersion: 1.0\nRequires-Dist: sglang-core>=0.1,<0.2\n"
    )
    (info / "entry_points.txt").write_text("[sglang_core.backends]\nfakegpu = fake_gpu:FakeGpuBackend\n")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def nothing(plan: Any, padded: bool, forward_batch: Any, sample: Any, *rest: Any) -> SampleOutput:
    """In place of a step: the same token for every row."""
    ids = torch.full((sample.slots.shape[0],), 7, dtype=torch.int32)
    return SampleOutput(ids=ids, logprobs=None, top_logprobs=None, top_ids=None)


def engine_of(folder: Path, args: argparse.Namespace) -> Any:
    config = json.loads((ROOT / "benchmarks/configs/llama-tiny.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": args.context}))
    ModelRunner.warm_up = lambda self, *, progress: None  # type: ignore[method-assign]
    settings = EngineConfig.from_flat(
        model_path=str(folder),
        device="fakegpu",
        dtype="float32",
        load_format="dummy",
        skip_tokenizer_init=True,
        context_length=args.context,
        max_running_requests=args.batch,
        max_total_tokens=args.batch * (2 * PROMPT + 64),
    )
    core = build_engine(settings, world_size=1, directory=None, progress=False)
    core.runner._run = nothing  # type: ignore[attr-defined]
    return core


def timed(seconds: list[float], fn: Any) -> Any:
    def run(*args: Any) -> Any:
        started = time.thread_time()
        try:
            return fn(*args)
        finally:
            seconds.append(time.thread_time() - started)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", type=int, default=4096, help="which page tables have room for")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        install_device(folder)
        core, rng = engine_of(folder, args), np.random.default_rng(0)
        sampling = SamplingParams(temperature=args.temperature, max_new_tokens=PROMPT, ignore_eos=True)
        for i in range(args.batch):
            core.handle(AddReq(rid=str(i), input_ids=rng.integers(3, 500, PROMPT).tolist(), sampling=sampling))
        decoding: set[str] = set()
        while len(decoding) < args.batch:
            decoding |= {output.rid for output in core.step() if output.token_ids}
        seconds: dict[str, list[float]] = defaultdict(list)
        core.scheduler.schedule = timed(seconds["plan"], core.scheduler.schedule)
        core.runner.launch = timed(seconds["launch"], core.runner.launch)
        core.scheduler.process_results = timed(seconds["results"], core.scheduler.process_results)
        for _ in range(args.steps):
            core.step()
        core.runner.close()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in (medians | {"step": sum(medians.values())}).items():
        print(f"{name:8} {1e3 * taken:7.3f} ms")


if __name__ == "__main__":
    main()
