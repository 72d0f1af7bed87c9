"""The calls that `FlatCommunicator` makes, on gloo: two processes, against what each collective means."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_core.api import FlatCommunicator

SIZE = 2


def check(rank: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, SIZE, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    comm = FlatCommunicator(dist.new_group([0, 1]), [0, 1], rank)
    parts = [torch.arange(24.0).view(2, 3, 4) + 100 * r for r in range(SIZE)]
    mine = parts[rank]
    for dim in (0, 1, 2, -1):
        assert torch.equal(comm.all_gather(mine, dim=dim), torch.cat(parts, dim=dim))
    assert torch.equal(comm.all_gather(mine.transpose(0, 2), dim=0), torch.cat([p.transpose(0, 2) for p in parts]))
    for dim in (0, 2):
        assert torch.equal(comm.reduce_scatter(mine.clone(), dim=dim), sum(parts).chunk(SIZE, dim=dim)[rank])
    assert torch.equal(comm.all_to_all(mine), torch.stack([p[rank] for p in parts]))
    assert torch.equal(comm.all_to_all(mine.flip(2)), torch.stack([p[rank].flip(1) for p in parts]))
    assert torch.equal(comm.all_reduce(mine.clone()), sum(parts))
    dist.destroy_process_group()


def test_collectives_of_two_ranks() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(check, args=(port,), nprocs=SIZE)  # raises what a rank raises
