"""Pools whose leaves are arrays of JAX. A step rebinds them (they are donated); outside of steps they take and give host tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.api import Pool, PoolSpec, StatePool, StatePoolSpec
from sglang_tpu.environment import array, lift, on_device, zeros
from sglang_tpu.kernels import LANE_LAYOUT

META = torch.device("meta")
LANES = 128  # of a vector register: a page whose rows are not whole ones would be transposed for a kernel, and back, in every step


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


class LanePool(TpuPool):
    """As the canonical layout, with every row filled up to whole lanes: [N, P, Hk, ceil(D / 128) * 128]. What fills is never looked at.

    Of numbers as they are only: codes of fp8 and int8 have no kernel here. All methods take and give rows of D.
    """

    layout = LANE_LAYOUT

    def __init__(self, spec: PoolSpec, num_pages: int, make: Make = zeros) -> None:
        assert spec.scaling == "none", f"a pool of {spec.dtype} is canonical"
        filled = replace(spec, head_dim=whole_lanes(spec.head_dim), v_head_dim=whole_lanes(spec.v_head_dim))
        super().__init__(filled, num_pages, make)
        self.spec = spec

    def _read(
        self, layer: int, pick: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        return self._narrow(super()._read(layer, pick, spread, dtype))

    @on_device
    def scatter(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        Pool.scatter(self, layer, slots, *self._wide((k, v)))

    @on_device
    def export_pages(self, layer: int, pages: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._narrow(Pool.export_pages(self, layer, pages)))

    @on_device
    def import_pages(self, layer: int, pages: Tensor, *stored: Tensor) -> None:
        Pool.import_pages(self, layer, pages, *self._wide(stored))

    def _narrow(self, rows: Iterable[Tensor]) -> list[Tensor]:
        return [x[..., :dim] for x, dim in zip(rows, (self.spec.head_dim, self.spec.v_head_dim), strict=True)]

    def _wide(self, rows: Iterable[Tensor]) -> list[Tensor]:
        return [F.pad(x, (0, whole_lanes(x.shape[-1]) - x.shape[-1])) for x in rows]


def pool_of(spec: PoolSpec, num_pages: int, make: Make = zeros) -> TpuPool:
    """In the layout that kernel selection chose: one of the two."""
    return (LanePool if spec.layout == LanePool.layout else TpuPool)(spec, num_pages, make)


def whole_lanes(dim: int) -> int:
    return -(-dim // LANES) * LANES


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
