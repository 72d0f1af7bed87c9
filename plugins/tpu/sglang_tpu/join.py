"""Joining the models of a mesh's ranks: rank 0's modules then hold every rank's tensors, a part on each device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from torch import Tensor, nn

from sglang_core.api import PluginError
from sglang_tpu.environment import to_jax, wrap
from sglang_tpu.mesh import OF_A_RANK

M = TypeVar("M")


@dataclass(kw_only=True, slots=True)
class Joined:
    """A tensor of rank 0's model: in which modules it is, by their place, and each rank's part of it."""

    title: str
    places: list[tuple[int, str, str]] = field(default_factory=list)  # module, its dictionary, name
    parts: list[jax.Array] = field(default_factory=list)

    def take(self, modules: list[nn.Module], device: jax.Device) -> None:
        """Moves a rank's tensor to its device: modules hold None in its place. Where the rank has none (a bias of a sum), it is zeros."""
        held = [(getattr(modules[i], kind), name) for i, kind, name in self.places]
        tensor: Tensor | None = held[0][0].get(held[0][1])
        if tensor is None:
            first = self.parts[0]
            self.parts.append(jnp.zeros(first.shape, first.dtype, device=device))
        elif not tensor.ndim or (self.parts and tuple(tensor.shape) != self.parts[0].shape):
            shapes = [list(part.shape) for part in self.parts] + [list(tensor.shape)]
            raise PluginError(f"{self.title}: ranks of a mesh hold equal parts with a first dimension, not {shapes}")
        else:
            self.parts.append(to_jax(tensor, device))
        for tensors, name in held:
            tensors[name] = None

    def put(self, modules: list[nn.Module], mesh: Mesh) -> None:
        """One array of all parts, cut along the first dimension into them."""
        first = self.parts[0]
        shape = (first.shape[0] * mesh.size, *first.shape[1:])
        whole = wrap(jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, OF_A_RANK), self.parts))
        for i, kind, name in self.places:
            getattr(modules[i], kind)[name] = whole


def join_models(models: Iterator[M], mesh: Mesh) -> M:
    """Rank 0's model, with all ranks' tensors. One rank's are on the host at a time: they leave it before the next model is asked for.

    Raises PluginError where ranks hold parts of unequal shapes.
    """
    first: Any = next(models)
    modules, tensors = list(first.modules()), _tensors(first)
    for rank, device in enumerate(mesh.devices.flat):
        model: Any = next(models) if rank else first
        of_rank = list(model.modules())
        for tensor in tensors:
            tensor.take(of_rank, device)
    for tensor in tensors:
        tensor.put(modules, mesh)
    joined: M = first
    return joined


def _tensors(model: nn.Module) -> list[Joined]:
    """What the modules hold, each tensor once."""
    found: dict[int, Joined] = {}
    for i, (path, module) in enumerate(model.named_modules()):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, kind).items():
                if tensor is not None:
                    found.setdefault(id(tensor), Joined(title=f"{path}.{name}")).places.append((i, kind, name))
    return list(found.values())
