"""A mesh of devices that one process drives: ranks are places along an axis, and a step is one program for all of them.

A model is traced as rank 0's. What a rank holds (its weights, its pools) is a part of one array, cut along the first dimension; all else is
the same on every rank. So what differs between ranks must be data: a step that asks for its rank in Python would be rank 0's everywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import Tensor

from sglang_tpu.environment import array, shape_of, wrap

AXIS = "tp"
EVERYWHERE, OF_A_RANK = PartitionSpec(), PartitionSpec(AXIS)
_thread = threading.local()


class MeshCommunicator:
    """Collectives of a step over the mesh. They are part of its program, and exist nowhere else."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, x: Tensor) -> Any:
        return wrap(jax.lax.psum(array(x), AXIS))

    def all_gather(self, x: Tensor, dim: int = -1) -> Any:
        if not x.shape[dim]:
            return x  # nothing of everybody; XLA's verifier refuses to gather it
        return wrap(jax.lax.all_gather(array(x), AXIS, axis=dim % x.ndim, tiled=True))

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Any:
        return wrap(jax.lax.psum_scatter(array(x), AXIS, scatter_dimension=dim % x.ndim, tiled=True))

    def all_to_all(self, x: Tensor) -> Any:
        return wrap(jax.lax.all_to_all(array(x), AXIS, split_axis=0, concat_axis=0, tiled=True))

    def broadcast(self, x: Tensor, src: int = 0) -> Any:
        return wrap(jax.lax.all_gather(array(x), AXIS)[src])

    def send(self, x: Tensor, dst: int) -> None:
        raise ValueError(f"send to rank {dst}: ranks of a mesh run one program, in which none sends alone")

    def recv(self, x: Tensor, src: int) -> Tensor:
        raise ValueError(f"recv from rank {src}: ranks of a mesh run one program, in which none sends alone")

    def barrier(self) -> None:
        """A program's collectives are all there is to wait for."""


@contextmanager
def traced_over(mesh: Mesh | None) -> Iterator[None]:
    """Meanwhile this thread traces a program of the mesh's ranks."""
    _thread.mesh = mesh
    try:
        yield
    finally:
        _thread.mesh = None


def first_of_rank(rows: int) -> Any:
    """Which of all ranks' rows is the first of this rank's `rows`, as a tensor in a program of a mesh; 0 elsewhere."""
    if getattr(_thread, "mesh", None) is None:
        return 0
    return wrap(jax.lax.axis_index(AXIS) * rows)


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """Where an array lies that is the same on all ranks; None without a mesh: on the device."""
    return None if mesh is None else NamedSharding(mesh, EVERYWHERE)


def spec_of(x: jax.Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    """How an array lies on the mesh."""
    return x.sharding.spec if isinstance(x.sharding, NamedSharding) else EVERYWHERE


def spread_shape(x: Any, mesh: Mesh) -> Any:
    """A lifted tensor without values becomes one of which each rank has as much as it was; in a trace it is a rank's part."""
    part = array(x)
    if mesh.size > 1 and part.shape and spec_of(part) == EVERYWHERE:
        shape = (part.shape[0] * mesh.size, *part.shape[1:])
        x._elem = jax.ShapeDtypeStruct(shape, part.dtype, sharding=NamedSharding(mesh, OF_A_RANK))
    return x


def zeros_over(mesh: Mesh, shape: Sequence[int], dtype: torch.dtype) -> Any:
    """A lifted tensor of which each rank has one of this shape, made on the devices."""
    part = shape_of(torch.empty(tuple(shape), dtype=dtype, device="meta"))
    whole = (part.shape[0] * mesh.size, *part.shape[1:])
    return wrap(jnp.zeros(whole, part.dtype, device=NamedSharding(mesh, OF_A_RANK)))
