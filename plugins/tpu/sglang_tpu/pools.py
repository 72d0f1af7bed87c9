"""Pools whose leaves are arrays of JAX. A step rebinds them (they are donated); outside of steps they take and give host tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.api import Pool, PoolSpec, StatePool, StatePoolSpec
from sglang_tpu.environment import array, environment, is_lifted, lift, on_device, to_jax, to_torch, wrap, zeros
from sglang_tpu.jax_kernels import INTERLEAVED
from sglang_tpu.kernels import LANE_LAYOUT

META = torch.device("meta")
LANES = 128  # of a vector register: a page whose rows are not whole ones would be transposed for a kernel, and back, in every step


def addresses(leaves: list[torch.Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of each leaf, until the next step."""
    return [(array(leaf).unsafe_buffer_pointer(), array(leaf).nbytes) for leaf in leaves]


Make = Callable[[Sequence[int], torch.dtype], Any]


def one_program(method: Callable[..., Any]) -> Callable[..., Any]:
    """A pool's method of rows (a layer, if any, then tensors [n, ...]), compiled whole for callers that have host tensors.

    Rows are filled up to a power of two, or there would be a program for each n: with copies of the last one, which
    read and write what it does. Within a step it is the method.
    """

    def call(pool: Any, *args: Any) -> Any:
        layer, rows = args[: len(args) - _num_tensors(args)], args[len(args) - _num_tensors(args) :]
        if any(is_lifted(x) for x in rows):
            return method(pool, *args)
        scales = [array(scale) for scale in getattr(pool, "scales", [])]
        leaves, made = _run(
            method,
            type(pool),
            pool.spec,
            layer,
            [array(leaf) for leaf in pool.leaves],
            scales,
            [to_jax(_filled(x)) for x in rows],
        )
        for leaf, value in zip(pool.leaves, leaves, strict=True):
            leaf._elem = value
        return None if made is None else tuple(to_torch(x)[: len(rows[0])] for x in made)

    call.__doc__, call.__name__ = method.__doc__, method.__name__
    return call


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def _run(
    method: Callable[..., Any],
    kind: type[Any],
    spec: Any,
    layer: tuple[int, ...],
    leaves: list[jax.Array],
    scales: list[jax.Array],
    rows: list[jax.Array],
) -> tuple[list[jax.Array], tuple[jax.Array, ...] | None]:
    """-> the leaves as they are now, and what the method gives: of a pool that has these."""
    given = iter(leaves)
    with environment():
        pool = kind(spec, leaves[0].shape[0], lambda *_: wrap(next(given)))
        pool.scales = [wrap(scale) for scale in scales]
        made = method(pool, *layer, *(wrap(x) for x in rows))
        return [array(leaf) for leaf in pool.leaves], None if made is None else tuple(array(x) for x in made)


def _num_tensors(args: Sequence[Any]) -> int:
    return sum(isinstance(x, Tensor) for x in args)


def _filled(x: Tensor) -> Tensor:
    """[n, ...] -> [the next power of two, ...]; none stay none."""
    wanted = 1 << (len(x) - 1).bit_length() if len(x) else 0
    return torch.cat([x, x[-1:].expand(wanted - len(x), *x.shape[1:])])


@one_program
def _poison(pool: Any, index: Tensor) -> None:
    for leaf in pool.leaves:
        if leaf.dtype != torch.int8:
            leaf.index_put_((index,), leaf.new_full((), float("nan")))


def _poisoned(pool: Any, index: Iterable[int]) -> None:
    """As the pool's own."""
    _poison(pool, torch.tensor(list(index), dtype=torch.int32))


class TpuPool(Pool):
    """The canonical layout."""

    def __init__(self, spec: PoolSpec, num_pages: int, make: Make = zeros) -> None:
        super().__init__(spec, num_pages, META)
        self.leaves = [make(leaf.shape, leaf.dtype) for leaf in self.leaves]
        self.scales = [lift(torch.ones(scale.shape)) for scale in self.scales]

    gather = one_program(Pool.gather)
    gather_heads = on_device(Pool.gather_heads)
    scatter = one_program(Pool.scatter)
    move = one_program(Pool.move)
    export_pages = one_program(Pool.export_pages)
    import_pages = one_program(Pool.import_pages)
    set_scales = on_device(Pool.set_scales)
    poison = _poisoned

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

    @one_program
    def scatter(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        Pool.scatter(self, layer, slots, *self._wide((k, v)))

    @one_program
    def export_pages(self, layer: int, pages: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._narrow(Pool.export_pages(self, layer, pages)))

    @one_program
    def import_pages(self, layer: int, pages: Tensor, *stored: Tensor) -> None:
        Pool.import_pages(self, layer, pages, *self._wide(stored))

    def _narrow(self, rows: Iterable[Tensor]) -> list[Tensor]:
        return [x[..., :dim] for x, dim in zip(rows, (self.spec.head_dim, self.spec.v_head_dim), strict=True)]

    def _wide(self, rows: Iterable[Tensor]) -> list[Tensor]:
        return [F.pad(x, (0, whole_lanes(x.shape[-1]) - x.shape[-1])) for x in rows]


class InterleavedPool(TpuPool):
    """As jax's kernels read it: one leaf a layer, [N, P, 2 Hk, W], each head's keys and then its values, filled up to whole lanes.

    Keys and values as they are, and no latents. All methods take and give the canonical layout.
    """

    layout = INTERLEAVED

    def __init__(self, spec: PoolSpec, num_pages: int, make: Make = zeros) -> None:
        assert spec.scaling == "none" and spec.kind == "full", f"a pool of {spec.kind} {spec.dtype} is canonical"
        Pool.__init__(self, spec, num_pages, META)
        width = whole_lanes(max(spec.head_dim, spec.v_head_dim))
        shape = (num_pages, spec.page_size, 2 * spec.num_kv_heads, width)
        self.leaves = [make(shape, spec.dtype) for _ in range(spec.num_layers)]

    @one_program
    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        size = self.spec.page_size
        return self._apart(self.leaves[layer][slots // size, slots % size])

    @on_device
    def gather_heads(self, layer: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        size = self.spec.page_size
        k, v = self._apart(self.leaves[layer][slots // size, slots % size])
        return k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype)

    @one_program
    def scatter(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        size = self.spec.page_size
        self.leaves[layer].index_put_((slots // size, slots % size), self._together(k, v))

    @one_program
    def export_pages(self, layer: int, pages: Tensor) -> tuple[Tensor, ...]:
        return self._apart(self.leaves[layer][pages])

    @one_program
    def import_pages(self, layer: int, pages: Tensor, k: Tensor, v: Tensor) -> None:
        self.leaves[layer].index_put_((pages,), self._together(k, v))

    def _apart(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 2 Hk, W] -> [..., Hk, D], [..., Hk, Dv]"""
        pairs = rows.unflatten(-2, (self.spec.num_kv_heads, 2))
        return pairs[..., 0, : self.spec.head_dim], pairs[..., 1, : self.spec.v_head_dim]

    def _together(self, k: Tensor, v: Tensor) -> Tensor:
        """The inverse."""
        width = self.leaves[0].shape[-1]
        pairs = torch.stack([F.pad(x, (0, width - x.shape[-1])) for x in (k, v)], dim=-2)
        return pairs.flatten(-3, -2).to(self.spec.dtype)


POOLS = {kind.layout: kind for kind in (TpuPool, LanePool, InterleavedPool)}


def pool_of(spec: PoolSpec, num_pages: int, make: Make = zeros) -> TpuPool:
    """In the layout that kernel selection chose, one of POOLS."""
    return POOLS[spec.layout](spec, num_pages, make)


def whole_lanes(dim: int) -> int:
    return -(-dim // LANES) * LANES


class TpuStatePool(StatePool):
    """The canonical layout."""

    def __init__(self, spec: StatePoolSpec, num_slots: int, make: Make = zeros) -> None:
        super().__init__(spec, num_slots, META)
        self.leaves = [make(leaf.shape, leaf.dtype) for leaf in self.leaves]

    gather = one_program(StatePool.gather)
    scatter = one_program(StatePool.scatter)
    move = one_program(StatePool.move)
    poison = _poisoned

    def regions(self) -> list[tuple[int, int]]:
        return addresses(self.leaves)
