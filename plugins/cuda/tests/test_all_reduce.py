"""Who sums by peers' memory and who by NCCL: ranks as threads that meet through a store, and regions that are the host's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sglang_cuda import all_reduce, runtime
from sglang_cuda.all_reduce import ONE_SHOT_BYTES, SLOT_BYTES, CudaPeerMemory, PeerCommunicator, meet
from sglang_triton.gpu.runtime import GpuRuntime
from torch import Tensor

from sglang_core.api import FlatCommunicator, LocalCommunicator, TorchCommunicator


class HostMemory:
    """Of one rank. Regions are numbers; what is under way at any time is counted over all ranks."""

    live: set[tuple[int, int]]  # (rank that maps it, region)

    def __init__(self, rank: int, *, cannot: str = "") -> None:
        self.rank, self.cannot = rank, cannot
        self.calls: list[tuple[tuple[int, ...], int, torch.Size, bool]] = []

    def alloc(self) -> int:
        if self.cannot == "alloc":
            raise OSError("out of memory")
        return self._take(100 + self.rank)

    def export(self, region: int) -> bytes:
        return bytes([region])

    def open(self, handle: bytes) -> int:
        if self.cannot == "open":
            raise OSError("peer access is not supported between these two devices")
        return self._take(handle[0])

    def close(self, region: int) -> None:
        assert region != 100 + self.rank, "one's own is freed, not unmapped"
        self.live.remove((self.rank, region))

    def free(self, region: int) -> None:
        assert region == 100 + self.rank
        self.live.remove((self.rank, region))

    def all_reduce(self, regions: Sequence[int], rank: int, x: Tensor, y: Tensor, *, two_shots: bool) -> None:
        self.calls.append((tuple(regions), rank, x.shape, two_shots))

    def _take(self, region: int) -> int:
        self.live.add((self.rank, region))
        return region


@pytest.fixture(autouse=True)
def nothing_is_mapped() -> None:
    HostMemory.live = set()


def nccl(rank: int, size: int) -> FlatCommunicator:
    return FlatCommunicator(SimpleNamespace(), range(size), rank)  # type: ignore[arg-type]


def met(memories: Sequence[HostMemory | None]) -> list[FlatCommunicator]:
    store, size = dist.HashStore(), len(memories)
    found: dict[int, FlatCommunicator] = {}

    def join(rank: int) -> None:
        found[rank] = meet(nccl(rank, size), store, 20.0, memories[rank])

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


def test_ranks_map_each_other_in_rank_order_and_let_go() -> None:
    memories = [HostMemory(rank) for rank in range(3)]
    comms = met(memories)
    assert all(isinstance(comm, PeerCommunicator) and comm.rank == rank for rank, comm in enumerate(comms))
    x = torch.ones(64)
    for comm, memory in zip(comms, memories, strict=True):
        assert comm.all_reduce(x) is x
        assert memory.calls == [((100, 101, 102), comm.rank, x.shape, False)]
    assert len(HostMemory.live) == 9
    del comms, comm
    assert not HostMemory.live


@pytest.mark.parametrize(
    ("cannot", "reason"), [("alloc", "out of memory"), ("open", "rank 1 cannot map another's memory: peer access")]
)
def test_where_one_rank_cannot_all_use_nccl_and_the_log_says_why(
    cannot: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    comms = met([HostMemory(0), HostMemory(1, cannot=cannot), HostMemory(2)])
    assert [type(comm) for comm in comms] == [FlatCommunicator] * 3 and not HostMemory.live
    assert caplog.text.count(reason) == 3


def test_without_the_library_all_use_nccl(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(all_reduce, "CudaPeerMemory", lambda: CudaPeerMemory(Path("/nowhere/_all_reduce.so")))
    assert [type(comm) for comm in met([None, None])] == [FlatCommunicator] * 2
    assert "the kernel is not built; python -m sglang_cuda.build_all_reduce" in caplog.text


def test_hosts_apart_and_too_many_ranks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hosts = iter("ab")
    monkeypatch.setattr(all_reduce, "_host", lambda: next(hosts))
    assert [type(comm) for comm in met([HostMemory(0), HostMemory(1)])] == [FlatCommunicator] * 2
    monkeypatch.setattr(all_reduce, "_host", lambda: "a")
    assert {type(comm) for comm in met([HostMemory(rank) for rank in range(9)])} == {FlatCommunicator}
    assert "they are on several hosts" in caplog.text and "9 ranks, and it is for 2 to 8" in caplog.text
    assert not HostMemory.live


@pytest.mark.parametrize(
    ("make", "by"),
    [
        (lambda: torch.ones(ONE_SHOT_BYTES[4] // 4), "one shot"),
        (lambda: torch.ones(ONE_SHOT_BYTES[4] // 4 + 4), "two shots"),
        (lambda: torch.ones(SLOT_BYTES // 2, dtype=torch.bfloat16), "two shots"),
        (lambda: torch.ones(SLOT_BYTES // 2 + 8, dtype=torch.bfloat16), "nccl"),
        (lambda: torch.ones(7), "nccl"),  # no multiple of 16 bytes
        (lambda: torch.ones(9)[1:], "nccl"),  # not aligned to them
        (lambda: torch.ones(0), "nccl"),
        (lambda: torch.ones(8, dtype=torch.int64), "nccl"),
        (lambda: torch.ones(8, 8).t(), "one shot"),  # made dense
    ],
)
def test_what_goes_where(make: Callable[[], Tensor], by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_nccl: list[Tensor] = []
    monkeypatch.setattr(TorchCommunicator, "all_reduce", lambda self, x: by_nccl.append(x) or x)
    memory: Any = HostMemory(0)
    comm = PeerCommunicator(nccl(0, 4), memory, [100, 101, 102, 103])
    comm._release.detach()  # these regions are nobody's
    x = make()
    assert comm.all_reduce(x).shape == x.shape
    found = ["two shots" if two else "one shot" for *_, two in memory.calls]
    assert (found or ["nccl"]) == [by] and len(by_nccl) == (by == "nccl")


def test_a_runtime_offers_it_to_groups_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(runtime, "meet", lambda comm, store, timeout: given.append((comm, store, timeout)) or "met")
    opened = object.__new__(runtime.CudaRuntime)  # without a GPU to open
    opened.ctx = SimpleNamespace(dist_timeout=7.0)
    several, alone = nccl(0, 2), LocalCommunicator()
    for found, want in ((several, "met"), (alone, alone)):
        monkeypatch.setattr(GpuRuntime, "communicator", lambda self, ranks, rank, store, found=found: found)
        assert opened.communicator([0, 1], 0, "store") is want
    assert given == [(several, "store", 7.0)]
