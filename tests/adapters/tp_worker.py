"""One rank of a tensor-parallel run with adapters: python tp_worker.py RANK SIZE STORE OUT BASE:ADAPTER:EP_SIZE... writes logits."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sglang_core.backend.communicator import Communicator
from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import RuntimeContext
from tests.adapters.adapted import Adapted
from tests.adapters.peft_adapters import TOKENS
from tests.models.harness import Row


def logits(base: str, adapter: str, ep_size: str, tp: Communicator | None) -> torch.Tensor:
    """Of a req with the adapter and one without, in one step."""
    adapted = Adapted(Path(base), {"a": Path(adapter)}, tp=tp, ep_size=int(ep_size))
    return torch.cat(adapted.step([(Row(), TOKENS, "a"), (Row(), TOKENS[:3], None)]))


def main(rank: int, size: int, store: str, out: str, *pairs: str) -> None:
    torch.set_num_threads(1)
    backend = CpuBackend()
    runtime = backend.create_runtime(RuntimeContext(devices=(backend.probe()[0],), rank=rank, world_size=size))
    tp = runtime.communicator(range(size), rank, dist.FileStore(store, size))
    results = {pair: logits(*pair.split(":"), tp) for pair in pairs}
    if rank == 0:
        save_file(results, out)
    tp.barrier()
    runtime.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
