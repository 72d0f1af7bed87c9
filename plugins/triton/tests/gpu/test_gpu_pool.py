"""Pools of GPUs against those of the core, byte for byte, through the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sglang_triton.gpu.pool import GpuPool, GpuStatePool
from torch import Tensor

from sglang_core.api import Pool, PoolSpec, StatePool, StatePoolSpec

pytestmark = pytest.mark.usefixtures("tiles")
CPU = torch.device("cpu")
SPEC = PoolSpec(num_layers=3, page_size=4, num_kv_heads=2, head_dim=24, v_head_dim=16, dtype=torch.bfloat16)
SRC, DST = torch.tensor([5, 6, 7, 19], dtype=torch.int32), torch.tensor([4, 5, 6, 10], dtype=torch.int32)


def filled(pool: Pool | StatePool) -> None:
    """Any bytes."""
    generator = torch.Generator().manual_seed(0)
    for leaf in pool.leaves:
        raw = leaf.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator))


def raw(leaves: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    return [leaf.contiguous().view(torch.uint8) for leaf in leaves]


SPECS = {
    "bfloat16": SPEC,
    "fp8": replace(SPEC, dtype=torch.float8_e4m3fn),
    "int8, scales, no whole words": replace(SPEC, dtype=torch.int8, num_kv_heads=1, head_dim=3, v_head_dim=5),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_slots_move_at_once_and_pages_come_back(spec: PoolSpec) -> None:
    """Slots move onto slots that move themselves; pages go to other pages of another pool."""
    mine, theirs, target = GpuPool(spec, 6, CPU), Pool(spec, 6, CPU), GpuPool(spec, 6, CPU)
    for pool in (mine, theirs):
        filled(pool)
        pool.move(SRC, DST)
    assert all(map(torch.equal, raw(mine.leaves), raw(theirs.leaves)))
    pages, there = torch.tensor([4, 1], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)
    for layer in range(spec.num_layers):
        stored = mine.export_pages(layer, pages)
        assert [part.dtype for part in stored] == [leaf.dtype for leaf in mine.layer_leaves(layer)]
        assert all(map(torch.equal, raw(stored), raw(theirs.export_pages(layer, pages))))
        target.import_pages(layer, there, *stored)
        for leaf, own in zip(target.layer_leaves(layer), mine.layer_leaves(layer), strict=True):
            assert torch.equal(leaf[there].view(torch.uint8), own[pages].view(torch.uint8))


def test_nothing_moves() -> None:
    pool, none = GpuPool(SPEC, 6, CPU), torch.empty(0, dtype=torch.int32)
    filled(pool)
    before = [leaf.clone() for leaf in raw(pool.leaves)]
    pool.move(none, none)
    assert all(map(torch.equal, raw(pool.leaves), before))


def test_states_move_at_once() -> None:
    spec = StatePoolSpec(num_layers=2, conv_shape=(3, 10), conv_dtype=torch.bfloat16, state_shape=(2, 4, 6))
    mine, theirs = GpuStatePool(spec, 20, CPU), StatePool(spec, 20, CPU)
    for pool in (mine, theirs):
        filled(pool)
        pool.move(SRC, DST)
    assert all(map(torch.equal, raw(mine.leaves), raw(theirs.leaves)))
