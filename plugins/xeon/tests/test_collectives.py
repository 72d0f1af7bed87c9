"""Ranks as threads where results are compared, as processes where one dies. Every call has a bound, so no test can hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sglang_xeon.collectives import MAX_RANKS, SharedMemoryCommunicator, meet
from sglang_xeon.library import ops
from sglang_xeon.runtime import XeonRuntime
from torch import Tensor

from sglang_core.api import DeviceInfo, LocalCommunicator, RuntimeContext

SLOT = 1 << 20  # bytes a rank puts at once (shared_group.cpp): sizes beyond it go in chunks
Ranks = list[SharedMemoryCommunicator]


def open_ranks(size: int, timeout: float = 60.0) -> Ranks:
    fd = os.memfd_create("test")
    os.ftruncate(fd, ops.group_bytes(size))
    ranks = [
        SharedMemoryCommunicator(fd, rank, size, timeout, [os.pidfd_open(os.getpid()) for _ in range(size)])
        for rank in range(size)
    ]
    os.close(fd)
    return ranks


def on_all(ranks: Ranks, call: Callable[[SharedMemoryCommunicator], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(call, ranks))


@pytest.fixture(params=[2, 3, 5])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    opened = open_ranks(request.param)
    yield opened
    for rank in opened:
        rank.close()


def inputs(size: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*shape).to(dtype) for _ in range(size)]


@pytest.mark.parametrize("count", [1, 17, 40_000, SLOT // 2 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_made_in_rank_order_in_float32_and_is_the_same_bits_on_every_rank(
    ranks: Ranks, count: int, dtype: torch.dtype, level: str
) -> None:
    parts = inputs(len(ranks), count, dtype=dtype)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    results = on_all(ranks, lambda c: c.all_reduce(parts[c.rank].clone()))
    for result in results:
        assert torch.equal(result, total.to(dtype))


def test_many_calls_in_a_row_do_not_mix(ranks: Ranks) -> None:
    def call(c: SharedMemoryCommunicator) -> list[float]:
        return [float(c.all_reduce(torch.full((n % 7 + 1,), float(n + c.rank)))[-1]) for n in range(300)]

    size = len(ranks)
    wanted = [float(n * size + size * (size - 1) // 2) for n in range(300)]
    assert on_all(ranks, call) == [wanted] * size


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_other_dtypes_are_summed_too(ranks: Ranks, dtype: torch.dtype) -> None:
    parts = [torch.arange(6).to(dtype) + i for i in range(len(ranks))]
    for result in on_all(ranks, lambda c: c.all_reduce(parts[c.rank].clone())):
        assert result.dtype == dtype
        assert torch.equal(result, torch.stack(parts).sum(0).to(dtype))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gathered_parts_stand_in_rank_order_along_any_dim(ranks: Ranks, dim: int) -> None:
    parts = inputs(len(ranks), 3, 4, 5)
    for result in on_all(ranks, lambda c: c.all_gather(parts[c.rank], dim=dim)):
        assert torch.equal(result, torch.cat(parts, dim=dim))


def test_what_is_not_contiguous_is_taken_as_it_reads(ranks: Ranks) -> None:
    parts = [x.t() for x in inputs(len(ranks), 4, 6)]
    for result in on_all(ranks, lambda c: c.all_gather(parts[c.rank], dim=0)):
        assert torch.equal(result, torch.cat(parts))


def test_gathering_more_than_a_slot_holds(ranks: Ranks) -> None:
    parts = inputs(len(ranks), SLOT // 4 + 11)
    for result in on_all(ranks, lambda c: c.all_gather(parts[c.rank], dim=0)):
        assert torch.equal(result, torch.cat(parts))


def test_reduce_scatter_is_a_slice_of_the_sum(ranks: Ranks) -> None:
    parts = inputs(len(ranks), 2 * len(ranks), 3)
    results = on_all(ranks, lambda c: c.reduce_scatter(parts[c.rank].clone(), dim=0))
    torch.testing.assert_close(torch.cat(results), torch.stack(parts).sum(0))


def test_all_to_all_transposes_rows_and_ranks(ranks: Ranks) -> None:
    size = len(ranks)
    results = on_all(ranks, lambda c: c.all_to_all(torch.arange(size)[:, None] * 10 + c.rank))
    for rank, result in enumerate(results):
        assert result[:, 0].tolist() == [rank * 10 + other for other in range(size)]


def test_broadcast_gives_everyone_the_source(ranks: Ranks) -> None:
    parts, src = inputs(len(ranks), SLOT // 4 + 5), len(ranks) - 1
    for result in on_all(ranks, lambda c: c.broadcast(parts[c.rank].clone(), src=src)):
        assert torch.equal(result, parts[src])


def test_messages_come_in_order_and_whole(ranks: Ranks) -> None:
    first, second = torch.randn(100_000), torch.arange(3)

    def call(c: SharedMemoryCommunicator) -> tuple[Tensor, Tensor] | None:
        if c.rank == 0:
            c.send(first, dst=1)
            c.send(second, dst=1)
        elif c.rank == 1:
            return c.recv(torch.empty_like(first), src=0), c.recv(torch.empty_like(second), src=0)
        return None

    received = on_all(ranks, call)[1]
    assert torch.equal(received[0], first)
    assert torch.equal(received[1], second)


def test_a_rank_does_not_write_to_itself_or_nobody(ranks: Ranks) -> None:
    for other in (0, len(ranks), -1):
        with pytest.raises(ValueError, match=f"rank {other} is no other rank of this group of {len(ranks)}"):
            ranks[0].send(torch.ones(1), dst=other)


def test_nobody_leaves_a_barrier_before_all_have_come(ranks: Ranks) -> None:
    arrived: list[int] = []

    def call(c: SharedMemoryCommunicator) -> int:
        time.sleep(0.01 * c.rank)
        arrived.append(c.rank)
        c.barrier()
        return len(arrived)

    assert on_all(ranks, call) == [len(ranks)] * len(ranks)


def test_ranks_that_call_different_things_are_told_so() -> None:
    ranks = open_ranks(2)

    def call(c: SharedMemoryCommunicator) -> str:
        with pytest.raises(RuntimeError) as error:
            c.all_reduce(torch.ones(4)) if c.rank else c.all_reduce(torch.ones(5))
        return str(error.value)

    assert any("another size" in said for said in on_all(ranks, call))


def test_a_silent_rank_is_an_error_once_the_timeout_is_over() -> None:
    ranks = open_ranks(2, timeout=0.3)
    with pytest.raises(RuntimeError, match=r"rank 1 has not answered within .*--dist-timeout"):
        ranks[0].barrier()
    with pytest.raises(RuntimeError, match="has failed"):  # and for the other one at once
        ranks[1].barrier()


def test_a_closed_group_says_so() -> None:
    [rank, other] = open_ranks(2)
    rank.close()
    with pytest.raises(RuntimeError, match="this group is closed"):
        rank.barrier()


def test_there_is_room_for_so_many_ranks_and_no_more() -> None:
    with pytest.raises(RuntimeError, match=f"there is room for {MAX_RANKS}"):
        ops.group_open(0, 0, MAX_RANKS + 1, 1.0, [-1] * (MAX_RANKS + 1))


VICTIM = """
import sys, torch, torch.distributed as dist
from sglang_xeon.collectives import meet
group = meet(range(2), 1, dist.FileStore(sys.argv[1], 2), 60.0)
print(group.all_reduce(torch.ones(3)).tolist(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_is_an_error_for_the_others_and_leaves_nothing(tmp_path: Path, end: signal.Signals) -> None:
    store = tmp_path / "store"
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, store], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        group = meet(range(2), 0, dist.FileStore(str(store), 2), 60.0)  # type: ignore[attr-defined]
        assert group is not None
        assert group.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
        assert process.stdout.readline() == "[2.0, 2.0, 2.0]\n"
        process.send_signal(end)  # and nobody reaps it yet: a zombie has ended, too
        with pytest.raises(RuntimeError, match="rank 1 has ended"):
            group.all_reduce(torch.ones(3))
    finally:
        process.kill()
        process.communicate()
    shared = [
        line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "sglang-ranks" in line
    ]
    assert set(shared) == {"/memfd:sglang-ranks (deleted)"}, (
        "memory without a name goes with the last process that maps it"
    )


def test_the_same_ranks_may_meet_again() -> None:
    store = dist.HashStore()

    def both(rank: int) -> list[float]:
        groups = [meet(range(2), rank, store, 60.0) for _ in range(2)]
        return [float(g.all_reduce(torch.full((1,), float(rank + i)))) for i, g in enumerate(groups) if g is not None]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(both, range(2))) == [[1.0, 3.0]] * 2


class OtherHost:
    """A store in which the other rank says that it runs elsewhere."""

    def __init__(self) -> None:
        self._values = {"shared_memory/0-1/1/1": b"elsewhere 1 -1", "shared_memory/0-1/1/1/joined": b"on several hosts"}

    def set_timeout(self, timeout: object) -> None: ...

    def add(self, key: str, amount: int) -> int:
        return amount

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._values[key]


def test_ranks_of_several_hosts_share_no_memory() -> None:
    store = OtherHost()
    assert meet(range(2), 0, store, 1.0) is None
    assert b"several hosts" in store.get("shared_memory/0-1/1/0/joined")


def test_the_runtime_gives_one_rank_no_group() -> None:
    info = DeviceInfo(backend="xeon", path="xeon/avx2", name="host", total_memory=1)
    runtime = XeonRuntime(RuntimeContext(devices=(info,), rank=0, world_size=1, num_threads=1))
    assert isinstance(runtime.communicator([0], 0, None), LocalCommunicator)
