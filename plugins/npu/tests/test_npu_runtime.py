"""The runtime's own parts: pools, sizes of decode steps, the stream. Nothing of torch_npu is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from sglang_npu.backend import NpuBackend
from sglang_npu.pools import LATENTS, LatentPool, NpuPool
from sglang_npu.runtime import MAX_GRAPHED_REQS, NpuRuntime, batch_sizes
from sglang_npu.stream import NpuStream

from sglang_core.api import DeviceError, DeviceInfo, KernelContext, Pool, PoolSpec, RuntimeContext

CPU = torch.device("cpu")
INFO = DeviceInfo(backend="npu", path="npu/910b3", name="Ascend 910B3")


class FakeDriver:
    """The host, with a log of what the runtime asks for."""

    device = CPU

    def __init__(self) -> None:
        self.log: list[str] = []
        self.bound: set[int] = set()

    def bind(self) -> None:
        self.bound.add(threading.get_ident())

    def memory(self) -> tuple[int, int]:
        return 3 << 30, 64 << 30

    def num_allocations(self) -> int:
        return 7

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def new_stream(self) -> str:
        return "own"

    def current_stream(self) -> str:
        return "caller's"

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        self.log.append(f"on {stream}")
        with nullcontext():
            yield

    def record(self, stream: str) -> Any:
        self.log.append(f"record {stream}")
        return self

    def wait(self, stream: str, event: object) -> None:
        self.log.append(f"{stream} waits")

    def query(self) -> bool:
        return True


def latents(rank: int, rope_dim: int, num_layers: int = 2) -> PoolSpec:
    return PoolSpec(
        kind="mla",
        num_layers=num_layers,
        page_size=16,
        num_kv_heads=1,
        head_dim=rank,
        v_head_dim=rope_dim,
        dtype=torch.bfloat16,
        layout=LATENTS,
    )


@pytest.mark.parametrize(("rank", "rope_dim"), [(512, 64), (24, 8)])
def test_a_pool_of_latents_gives_what_it_was_given(rank: int, rope_dim: int) -> None:
    ours, canonical = LatentPool(latents(rank, rope_dim), 4, CPU), Pool(latents(rank, rope_dim), 4, CPU)
    slots = torch.tensor([17, 3, 60], dtype=torch.int32)
    c_kv, k_pe = torch.randn(3, 1, rank).bfloat16(), torch.randn(3, 1, rope_dim).bfloat16()
    for pool in (ours, canonical):
        pool.poison(range(4))
        pool.scatter(1, slots, c_kv, k_pe)
    for a, b in zip(ours.gather(1, slots), canonical.gather(1, slots), strict=True):
        assert torch.equal(a, b)
    at = slots.view(1, 3)
    for a, b in zip(ours.gather_heads(1, at, torch.float32), canonical.gather_heads(1, at, torch.float32), strict=True):
        assert torch.equal(a, b)
    assert ours.k(1).shape == (4, 16, 1, 512) and not ours.k(1).flatten(0, 1)[17, 0, rank:].any()
    assert ours.fingerprint != canonical.fingerprint  # their bytes may not be exchanged


def test_pages_come_back_as_they_went() -> None:
    pool = LatentPool(latents(24, 8), 4, CPU)
    slots = torch.arange(16, 32, dtype=torch.int32)
    c_kv, k_pe = torch.randn(16, 1, 24).bfloat16(), torch.randn(16, 1, 8).bfloat16()
    pool.scatter(0, slots, c_kv, k_pe)
    pool.import_pages(
        0, torch.tensor([3], dtype=torch.int32), *pool.export_pages(0, torch.tensor([1], dtype=torch.int32))
    )
    assert torch.equal(pool.gather(0, slots + 32)[0], c_kv)


def test_pools_begin_as_zeros() -> None:
    spec = PoolSpec(num_layers=1, page_size=16, num_kv_heads=2, head_dim=64, v_head_dim=64, dtype=torch.bfloat16)
    assert not any(leaf.any() for leaf in (*NpuPool(spec, 3, CPU).leaves, *LatentPool(latents(24, 8), 3, CPU).leaves))


def test_a_pool_that_attention_could_not_count_is_refused() -> None:
    spec = PoolSpec(num_layers=1, page_size=128, num_kv_heads=8, head_dim=128, v_head_dim=128, dtype=torch.bfloat16)
    with pytest.raises(DeviceError, match=r"--max-total-tokens 2097024"):
        NpuPool(spec, 2**14, CPU)


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 30, 100, 256])
def test_decode_steps_are_padded_little(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes[-1] == largest and sizes == sorted(set(sizes))
    for reqs in range(1, largest + 1):
        padded = next(size for size in sizes if size >= reqs)
        assert padded - reqs < max(8, reqs / 4 + 1), (reqs, padded)


def test_buckets_are_of_decodes_and_there_are_none_where_ops_are_watched() -> None:
    limits = {"max_num_tokens": 4096, "max_num_reqs": 1000, "max_num_pages": 8}
    runtime = NpuRuntime(RuntimeContext(devices=(INFO,)), FakeDriver())
    made = runtime.buckets(**limits)
    assert made[0].num_reqs == MAX_GRAPHED_REQS and {b.max_extend for b in made} == {1}
    assert [b.num_tokens for b in made] == sorted((b.num_reqs for b in made), reverse=True)
    watched = NpuRuntime(RuntimeContext(devices=(INFO,), watched=True), FakeDriver())
    assert watched.buckets(**limits) == ()


def test_the_drivers_figures_are_the_runtimes() -> None:
    runtime = NpuRuntime(RuntimeContext(devices=(INFO,)), FakeDriver())
    memory = runtime.memory()
    assert (memory.free, memory.total, runtime.num_allocations()) == (3 << 30, 64 << 30, 7)


def test_a_step_runs_after_what_its_submitter_launched_before() -> None:
    driver = FakeDriver()
    stream = NpuStream(driver)
    work = [stream.submit(lambda i=i: driver.log.append(f"step {i}") or i) for i in range(2)]
    assert [w.result() for w in work] == [0, 1] and all(w.done() for w in work)
    own = [entry for entry in driver.log if entry != "record caller's" and entry != "synchronize"]
    assert own == [e for i in range(2) for e in ("on own", "own waits", f"step {i}", "record own")]
    assert driver.log[0] == "record caller's" and threading.get_ident() not in driver.bound
    stream.close()


def test_a_step_that_raises_is_raised_where_it_is_waited_for() -> None:
    stream = NpuStream(FakeDriver())
    work = stream.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        work.result()
    assert work.done()
    stream.close()


def test_every_kernel_is_for_the_npu_and_graph_safe() -> None:
    for kernel in NpuBackend().kernels(KernelContext(device=INFO)):
        assert kernel.device == ("npu",) and "graph_safe" in kernel.features, kernel
