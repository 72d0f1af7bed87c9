"""A decode step of one request, from plan to token on the host: in this process, or in one of its own, as how kernels are launched is settled where they are imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from sglang_core.bench.step import StepDriver, StepShape, open_rank
from sglang_core.config import EngineConfig

DEPENDENT = "SGLANG_TRITON_PDL"
SEED = 0


def measured(given: Mapping[str, Any], context: int, repeats: int) -> dict[str, Any]:
    """`seconds`: the median step; `nbytes`: of weights that it reads; `tokens`: of `repeats` steps more."""
    torch.manual_seed(SEED)
    shape = StepShape.decode(1, context)
    rank = open_rank(EngineConfig.from_flat(**given), [shape])
    try:
        rank.runner.warm_up(progress=False)
        driver = StepDriver.of(rank)
        took = driver.measure(shape, repeats)
        tokens = [rank.runner.launch(driver.plan(shape)).result().token_ids[0][0] for _ in range(repeats)]
        return {"seconds": took.median, "nbytes": weight_bytes(rank.model), "tokens": tokens}
    finally:
        rank.runner.close()
        rank.runtime.close()


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all that a step reads whole. Of embeddings (not the head's matrix too, in these shapes) and tables of rotations, a row is read."""
    read = [x for name, x in model.named_buffers() if "embed_tokens" not in name and "rotary" not in name]
    return sum(x.numel() * x.element_size() for x in read)


def in_process_of_its_own(given: Mapping[str, Any], context: int, repeats: int, *, dependent: bool) -> Any:
    """As `measured`. `dependent`: whether kernels are launched before the ones ahead have ended. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "benchmarks.gpu.decode", json.dumps([given, context, repeats])]
    environ = os.environ | {DEPENDENT: str(int(dependent))}
    done = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True, timeout=100)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measured(*json.loads(sys.argv[1]))))
