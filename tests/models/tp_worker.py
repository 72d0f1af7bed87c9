"""One rank of a tensor-parallel run: python tp_worker.py RANK SIZE STORE OUT FOLDER:EP_SIZE... writes logits to OUT as safetensors."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sglang_core.backend.communicator import Communicator
from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import RuntimeContext
from sglang_core.models.registry import create_model
from sglang_core.weights.checkpoint import read_config
from sglang_core.weights.loader import load_model
from tests.models.harness import Stepper, build_context, load

TOKENS = [list(range(3, 40)), [7, 5, 120]]


def logits(folder: Path, tp: Communicator | None, ep_size: int = 1) -> torch.Tensor:
    """A prefill of two reqs, both sources of weights."""
    ctx = build_context(tp=tp, ep_size=ep_size)
    dummy = load_model(create_model(read_config(folder)), folder, ctx, load_format="dummy", seed=3)
    rows = []
    for model in (load(folder, tp=tp, ep_size=ep_size), dummy):
        rows += [Stepper(model).logits(tokens) for tokens in TOKENS]
    return torch.cat(rows)


def main(rank: int, size: int, store: str, out: str, *cases: str) -> None:
    torch.set_num_threads(1)
    backend = CpuBackend()
    runtime = backend.create_runtime(RuntimeContext(devices=(backend.probe()[0],), rank=rank, world_size=size))
    tp = runtime.communicator(range(size), rank, dist.FileStore(store, size))
    asked = [case.rsplit(":", 1) for case in cases]
    results = {f"{Path(folder).name}:{ep_size}": logits(Path(folder), tp, int(ep_size)) for folder, ep_size in asked}
    if rank == 0:
        save_file(results, out)
    tp.barrier()
    runtime.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
