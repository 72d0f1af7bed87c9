"""Pools whose leaves are arrays of JAX. A step rebinds them (they are donated); outside of steps they take and give host tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import torch

from sglang_core.api import Pool, PoolSpec, StatePool, StatePoolSpec
from sglang_tpu.environment import array, lift, on_device, zeros

META = torch.device("meta")


def addresses(leaves: list[torch.Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of each leaf, until the next step."""
    return [(array(leaf).unsafe_buffer_pointer(), array(leaf).nbytes) for leaf in leaves]


Make = Callable[[Sequence[int], torch.dtype], Any]


class TpuPool(Pool):
    """The canonical layout."""

    def __init__(self, spec: PoolSpec, num_pages: int, make: Make = zeros) -> None:
        super().__init__(spec, num_pages, META)
        self.leaves = [make(leaf.shape, leaf.dtype) for leaf in self.leaves]
        self.scales = [lift(torch.ones(scale.shape)) for scale in self.scales]

    gather = on_device(Pool.gather)
    gather_heads = on_device(Pool.gather_heads)
    scatter = on_device(Pool.scatter)
    move = on_device(Pool.move)
    export_pages = on_device(Pool.export_pages)
    import_pages = on_device(Pool.import_pages)
    set_scales = on_device(Pool.set_scales)
    poison = on_device(Pool.poison)

    def regions(self) -> list[tuple[int, int]]:
        return addresses(self.leaves)


class TpuStatePool(StatePool):
    """The canonical layout."""

    def __init__(self, spec: StatePoolSpec, num_slots: int, make: Make = zeros) -> None:
        super().__init__(spec, num_slots, META)
        self.leaves = [make(leaf.shape, leaf.dtype) for leaf in self.leaves]

    gather = on_device(StatePool.gather)
    scatter = on_device(StatePool.scatter)
    move = on_device(StatePool.move)

    def poison(self, slots: Iterable[int]) -> None:
        """As the pool's own, whose indices are 64 bits wide."""
        index = list(slots)
        for leaf in self.leaves:
            leaf._elem = array(leaf).at[jnp.array(index, jnp.int32)].set(float("nan"))  # type: ignore[attr-defined]

    def regions(self) -> list[tuple[int, int]]:
        return addresses(self.leaves)
