"""Collectives of ranks on one host, in shared memory that has no name: whatever ends a rank, nothing stays in /dev/shm."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_xeon.library import ops

logger = logging.getLogger(__name__)
MAX_RANKS = 16
SUMMED = (torch.bfloat16, torch.float32)  # added by the kernel; other dtypes are gathered and added by torch


class SharedMemoryCommunicator:
    """A `Communicator` over a `SharedGroup` (csrc/shared_group.h).

    Calls come from one thread at a time. They raise RuntimeError on every rank once one has died, calls something else, or is
    silent for the group's timeout.
    """

    def __init__(self, fd: int, rank: int, size: int, timeout: float, pidfds: Sequence[int]) -> None:
        """`fd` is mapped and stays the caller's; `pidfds`, one a rank and -1 for none, are taken over."""
        self.rank, self.size = rank, size
        self._group = ops.group_open(fd, rank, size, timeout, list(pidfds))
        self.close = weakref.finalize(self, ops.group_close, self._group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """In place where x is contiguous. float32 and bfloat16 are added in float32, in rank order, and rounded once."""
        if x.dtype not in SUMMED:
            return self._gathered(x).sum(0, dtype=_sum_dtype(x)).to(x.dtype)
        x = x.contiguous()
        ops.group_all_reduce(x, self._group)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        gathered = self._gathered(x)
        dim %= x.dim()
        return gathered.flatten(0, 1) if dim == 0 else torch.cat(list(gathered), dim=dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self.all_reduce(x.contiguous()).chunk(self.size, dim=dim)[self.rank].contiguous()

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._gathered(x)[:, self.rank].contiguous()

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        sent = x.contiguous()
        ops.group_broadcast(sent, src, self._group)
        return x if sent is x else x.copy_(sent)

    def send(self, x: Tensor, dst: int) -> None:
        ops.group_send(x.contiguous(), self._peer(dst), self._group)

    def recv(self, x: Tensor, src: int) -> Tensor:
        received = x.contiguous()
        ops.group_recv(received, self._peer(src), self._group)
        return x if received is x else x.copy_(received)

    def barrier(self) -> None:
        ops.group_barrier(self._group)

    def _gathered(self, x: Tensor) -> Tensor:
        """[size, *x.shape]"""
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        ops.group_all_gather(x.contiguous(), out, self._group)
        return out

    def _peer(self, rank: int) -> int:
        if not 0 <= rank < self.size or rank == self.rank:
            raise ValueError(f"rank {rank} is no other rank of this group of {self.size}; this is rank {self.rank}")
        return rank


def meet(ranks: Sequence[int], rank: int, store: Any, timeout: float) -> SharedMemoryCommunicator | None:
    """The group of `ranks` (world ranks, `rank` among them), joined through `store`; None on all of them where one cannot join.

    The first rank makes an unnamed file in memory, which the others open through /proc while it holds it. Raises where a
    rank does not come within `timeout` seconds (torch.distributed.DistError, from the store).
    """
    me, size = list(ranks).index(rank), len(ranks)
    key = f"shared_memory/{'-'.join(map(str, ranks))}"
    store.set_timeout(timedelta(seconds=timeout))
    key += f"/{store.add(f'{key}/{me}/meetings', 1)}"  # these ranks may meet again, as another group
    fd = _create(size) if me == 0 else -1
    store.set(f"{key}/{me}", f"{_host()} {os.getpid()} {fd}")
    cards = [store.get(f"{key}/{other}").decode().split() for other in range(size)]
    pidfds: list[int] = []
    try:
        problem = _join_problem(cards, size)
        if problem is None:
            if me != 0:
                fd = os.open(f"/proc/{cards[0][1]}/fd/{cards[0][2]}", os.O_RDWR | os.O_CLOEXEC)
            pidfds = [os.pidfd_open(int(card[1])) for card in cards]
    except (OSError, AttributeError) as error:  # /proc hidden from us; a kernel or a Python without pidfds
        problem = str(error)
    store.set(f"{key}/{me}/joined", problem or "yes")
    joined = [store.get(f"{key}/{other}/joined").decode() for other in range(size)]
    try:
        if all(answer == "yes" for answer in joined):
            return SharedMemoryCommunicator(fd, me, size, timeout, pidfds)
        for pidfd in pidfds:
            os.close(pidfd)
        logger.info("no shared memory for ranks %s: %s", list(ranks), next(a for a in joined if a != "yes"))
        return None
    finally:
        if fd >= 0:
            os.close(fd)


def _create(size: int) -> int:
    """An unnamed file of zeros as large as a group needs; its pages take memory once they are written. -1 where it cannot be made."""
    try:
        fd = os.memfd_create("sglang-ranks", os.MFD_CLOEXEC)
        os.ftruncate(fd, ops.group_bytes(size))
        return fd
    except OSError:
        return -1


def _join_problem(cards: Sequence[Sequence[str]], size: int) -> str | None:
    """cards[r]: host, process id, file. Why these ranks cannot share memory."""
    if size > MAX_RANKS:
        return f"{size} ranks, and there is room for {MAX_RANKS}"
    if len({card[0] for card in cards}) > 1:
        return "the ranks are on several hosts, or in several containers"
    return "the first rank cannot create it" if cards[0][2] == "-1" else None


def _host() -> str:
    """The same for processes that see each other by process id: the boot, and the namespace of process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float16 else x.dtype
