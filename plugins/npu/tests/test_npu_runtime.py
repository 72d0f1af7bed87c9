"""The runtime's own parts: pools and sizes of decode steps. Nothing of torch_npu is needed."""

from __future__ import annotations

import pytest
import torch
from sglang_npu.backend import NpuBackend
from sglang_npu.pools import LATENTS, LatentPool, NpuPool
from sglang_npu.runtime import NpuRuntime, batch_sizes

from sglang_core.api import DeviceError, DeviceInfo, KernelContext, Pool, PoolSpec, RuntimeContext
from tests.backend.fake_driver import FakeDriver

CPU = torch.device("cpu")
INFO = DeviceInfo(backend="npu", path="npu/910b3", name="Ascend 910B3")


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


def test_the_longest_captured_step_is_of_so_many_reqs() -> None:
    runtime = NpuRuntime(RuntimeContext(devices=(INFO,)), FakeDriver())
    made = runtime.buckets(max_num_tokens=4096, max_num_reqs=1000, max_num_pages=8)
    assert [bucket.num_reqs for bucket in made] == batch_sizes(256)[::-1]


def test_every_kernel_is_for_the_npu_and_all_of_its_own_but_one_are_graph_safe() -> None:
    for kernel in NpuBackend().kernels(KernelContext(device=INFO)):
        assert kernel.device == ("npu",), kernel
        assert ("graph_safe" in kernel.features) == (not kernel.provider and kernel.op != "attn.ragged"), kernel
