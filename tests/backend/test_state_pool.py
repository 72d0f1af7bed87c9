"""A pool of recurrent states: what it holds, and what moves."""

from __future__ import annotations

import pytest
import torch

from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import DeviceRuntime, RuntimeContext
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.errors import KernelSelectionError

CPU = torch.device("cpu")


def spec(**changes: object) -> StatePoolSpec:
    facts = {"num_layers": 2, "conv_shape": (3, 10), "conv_dtype": torch.bfloat16, "state_shape": (2, 4, 5)}
    return StatePoolSpec(**(facts | changes))  # type: ignore[arg-type]


def filled(pool: StatePool) -> StatePool:
    """Each element says which slot it is in."""
    for leaf in pool.leaves:
        leaf.copy_(torch.arange(pool.num_slots).view(-1, *[1] * (leaf.ndim - 1)).expand(leaf.shape))
    return pool


def test_bytes_are_those_of_the_leaves() -> None:
    pool = StatePool(spec(), 7, CPU)
    assert sum(size for _, size in pool.regions()) == 7 * pool.spec.bytes_per_slot
    assert (pool.conv(1).shape, pool.conv(1).dtype) == ((7, 3, 10), torch.bfloat16)
    assert (pool.state(1).shape, pool.state(1).dtype) == ((7, 2, 4, 5), torch.float32)


def test_what_is_scattered_is_gathered() -> None:
    pool = filled(StatePool(spec(), 6, CPU))
    conv, state = torch.randn(2, 3, 10).bfloat16(), torch.randn(2, 2, 4, 5)
    slots = torch.tensor([4, 1], dtype=torch.int32)
    pool.scatter(1, slots, conv, state)
    ours = pool.gather(1, slots)
    assert torch.equal(ours[0], conv)
    assert torch.equal(ours[1], state)
    assert pool.state(1)[:, 0, 0, 0][[0, 2, 3, 5]].tolist() == [0, 2, 3, 5]
    assert pool.state(0)[:, 0, 0, 0].tolist() == list(range(6))


def test_move_reads_before_it_writes() -> None:
    pool = filled(StatePool(spec(), 5, CPU))
    pool.move(torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([2, 3, 1], dtype=torch.int32))
    for leaf in pool.leaves:
        assert leaf.flatten(1)[:, 0].tolist() == [0, 3, 1, 2, 4]


def test_poison_fills_the_slots_named() -> None:
    pool = filled(StatePool(spec(), 5, CPU))
    pool.poison([0, 3])
    for leaf in pool.leaves:
        assert leaf.flatten(1).isnan().all(1).tolist() == [True, False, False, True, False]
        assert not leaf[[1, 2, 4]].isnan().any()


@pytest.mark.parametrize("changes", [{"conv_shape": (2, 10)}, {"state_shape": (4, 2, 5)}, {"num_layers": 3}])
def test_pools_of_another_kind_have_another_fingerprint(changes: dict[str, object]) -> None:
    assert StatePool(spec(), 2, CPU).fingerprint == StatePool(spec(), 9, CPU).fingerprint
    assert StatePool(spec(), 2, CPU).fingerprint != StatePool(spec(**changes), 2, CPU).fingerprint


def runtime() -> DeviceRuntime:
    backend = CpuBackend()
    return backend.create_runtime(RuntimeContext(devices=(backend.probe()[0],)))


def test_a_runtime_makes_it_in_the_layouts_that_it_knows() -> None:
    assert runtime().alloc_state_pool(spec(), 4).num_slots == 4
    with pytest.raises(KernelSelectionError, match="'acme.tiled'"):
        runtime().alloc_state_pool(spec(layout="acme.tiled"), 4)
