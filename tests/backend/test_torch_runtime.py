"""The defaults that a torch device gets: steps, pools, streams, memory, and collectives over gloo."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_core.backend import torch_runtime
from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import DefaultsContext, DeviceInfo, RuntimeContext
from sglang_core.backend.pool import PoolSpec
from sglang_core.backend.torch_backend import TorchBackend
from sglang_core.backend.torch_runtime import TorchRuntime
from sglang_core.errors import KernelSelectionError

SPEC = PoolSpec(num_layers=1, page_size=2, num_kv_heads=1, head_dim=4, v_head_dim=4, dtype=torch.float32)
INFO = DeviceInfo(backend="cpu", path="cpu", name="cpu")


@pytest.fixture
def runtime():
    runtime = CpuBackend().create_runtime(RuntimeContext(devices=(INFO,)))
    yield runtime
    runtime.close()


def test_packed_weights_are_read_into_host_memory(runtime) -> None:
    memory = runtime.alloc_packed(12)
    assert (memory.dtype, memory.shape, memory.device.type) == (torch.uint8, (12,), "cpu")


def test_a_runtime_has_exact_shapes_and_runs_steps_without_grad(runtime) -> None:
    assert list(runtime.buckets(max_num_tokens=8, max_num_reqs=8, max_num_pages=8)) == []
    weight = torch.ones(3, requires_grad=True)
    step = runtime.compile_step(lambda state, fb: fb * weight + state, 1.0, ())
    out = step(torch.ones(3))
    assert out.tolist() == [2, 2, 2]
    assert not out.requires_grad


def test_a_layout_that_the_runtime_cannot_make_is_refused(runtime) -> None:
    assert runtime.alloc_pool(SPEC, 3).k(0).shape == (3, 2, 1, 4)
    nz = PoolSpec(
        num_layers=1, page_size=2, num_kv_heads=1, head_dim=4, v_head_dim=4, dtype=torch.float32, layout="acme.nz"
    )
    with pytest.raises(
        KernelSelectionError, match="pool layout 'acme.nz': the runtime of 'cpu' makes 'canonical' only"
    ):
        runtime.alloc_pool(nz, 3)


def test_a_stream_runs_in_order_on_one_thread_and_hands_errors_back(runtime) -> None:
    stream = runtime.stream()
    seen: list[tuple[int, str]] = []
    works = [stream.submit(lambda i: seen.append((i, threading.current_thread().name)), i) for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        stream.submit(lambda: 1 // 0).result()
    works[-1].result()
    assert [i for i, _ in seen] == list(range(20))
    assert len({name for _, name in seen} - {threading.current_thread().name}) == 1
    stream.close()


def test_memory_is_what_the_cgroup_leaves_and_what_the_process_holds(runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"memory.max": 3 << 20, "memory.current": 2 << 20}
    monkeypatch.setattr(torch_runtime, "_cgroup_bytes", figures.__getitem__)
    memory = runtime.memory()
    assert memory.free == 1 << 20
    assert memory.total > memory.free
    figures["memory.current"] = 4 << 20  # a cgroup may briefly be over its limit
    assert runtime.memory().free == 0


def test_a_torch_backend_addresses_devices_by_index() -> None:
    class Acme(TorchBackend):
        name = "acme"
        torch_device = "meta"

        def probe(self):
            return []

    info = DeviceInfo(backend="acme", index=3, path="acme", name="")
    assert Acme().torch_device_of(info) == "meta:3"
    assert CpuBackend().torch_device_of(info) == "cpu"


@pytest.mark.parametrize(("stored", "chosen"), [("float16", {"dtype": "float32"}), ("bfloat16", {}), (None, {})])
def test_the_cpu_reads_float16_checkpoints_in_float32(stored: str | None, chosen: dict[str, str]) -> None:
    for key in ("dtype", "torch_dtype"):
        model = {} if stored is None else {key: stored}
        assert CpuBackend().config_defaults(DefaultsContext(device=INFO, model=model)) == chosen


def _collectives(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    runtime = TorchRuntime(RuntimeContext(devices=(INFO,), rank=rank, world_size=2))
    comm = runtime.communicator((0, 1), rank, store)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 10 * rank
    assert comm.all_gather(x, dim=1).tolist() == [[1, 2, 11, 12], [3, 4, 13, 14]]
    assert comm.reduce_scatter(x.clone(), dim=0).tolist() == [[12, 14], [16, 18]][rank : rank + 1]
    assert comm.all_to_all(x).tolist() == [[1 + 2 * rank, 2 + 2 * rank], [11 + 2 * rank, 12 + 2 * rank]]
    assert comm.broadcast(x.clone(), src=1).tolist() == [[11, 12], [13, 14]]
    assert comm.all_reduce(x.clone()).tolist() == [[12, 14], [16, 18]]
    columns = x.repeat(1, 2)[:, ::2]  # strides that gloo takes for dense ones
    assert comm.all_reduce(columns).tolist() == [[12, 12], [16, 16]]
    assert comm.broadcast(x.repeat(1, 2)[:, ::2], src=1).tolist() == [[11, 11], [13, 13]]
    into = torch.zeros(2, 4)[:, ::2]
    if rank == 0:
        comm.send(x, 1)
    else:
        assert comm.recv(into, 0).tolist() == into.tolist() == [[1, 2], [3, 4]]
    comm.barrier()
    runtime.close()


def test_collectives_over_two_processes(tmp_path: Path) -> None:
    mp.spawn(_collectives, args=(str(tmp_path),), nprocs=2)


def test_one_rank_needs_no_process_group(runtime) -> None:
    comm = runtime.communicator((0,), 0, None)
    x = torch.ones(2)
    assert comm.all_reduce(x) is x
    with pytest.raises(ValueError, match="this group has one rank"):
        comm.send(x, 1)
