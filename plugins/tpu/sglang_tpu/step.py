"""`JittedStep`: a step function traced once for each kind of batch, compiled whole by XLA."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import torch
from jax.sharding import Mesh, NamedSharding
from torch import Tensor

from sglang_core.api import DeviceError, leaves, map_tensors, step_modules
from sglang_tpu.environment import array, environment, lift, lift_tree, stays_on_device, to_host, wrap
from sglang_tpu.mesh import EVERYWHERE, everywhere, spec_of, traced_over

log = logging.getLogger(__name__)


class JittedStep:
    """Called as the step is. A program belongs to the shapes, dtypes and static values of its batch.

    Batches of one bucket have tensors of the same shapes, as far as two have the same: they differ in which optional ones are there, and
    in static values. The first batches, of as many buckets as there are, come at start; `strict`: a batch of another is a DeviceError.

    Weights are its arguments, or XLA would copy them into each program; what the state declares is donated, so that a pool is
    changed where it is. Nothing of it is read on the host: a result is there to wait for.
    """

    def __init__(
        self, fn: Callable[..., Any], state: Any, num_buckets: int, *, strict: bool = False, mesh: Mesh | None = None
    ) -> None:
        """Without buckets, every batch is welcome. `mesh`: what its weights and state are spread over."""
        self._fn, self._state, self._num_buckets, self._strict, self._mesh = fn, state, num_buckets, strict, mesh
        self._weights = lift_weights(fn)
        lift_state(state, mesh)
        self._programs: dict[Hashable, Program] = {}
        self._buckets: list[dict[str, torch.Size]] = []  # shapes of the batches met, by path

    @property
    def num_programs(self) -> int:
        return len(self._programs)

    def __call__(self, batch: Any) -> Any:
        kind = _kind(batch)
        program = self._programs.get(kind)
        if program is None:
            self._find_bucket(batch)
            program = self._programs[kind] = Program(self._fn, self._state, batch, self._weights, self._mesh)
        made = program(batch)
        return made if stays_on_device() else to_host(made)

    def _find_bucket(self, batch: Any) -> None:
        shapes = {path: x.shape for path, x in leaves(batch, "") if isinstance(x, Tensor)}
        for known in self._buckets:
            if all(known.get(path, shape) == shape for path, shape in shapes.items()):
                return
        if 0 < self._num_buckets <= len(self._buckets):
            met = ", ".join(f"{path.lstrip('.')} {list(shape)}" for path, shape in list(shapes.items())[:3])
            if self._strict:
                raise DeviceError(
                    f"a step of no bucket ({met}, ...): it would be compiled while reqs wait, and --strict-compile forbids it"
                )
            log.warning("a step of no bucket (%s, ...) is compiled while serving: reqs wait for it", met)
        self._buckets.append(shapes)


class WatchedStep:
    """The step as it is, operator by operator: a compiled one calls no op that anybody could look at."""

    def __init__(self, fn: Callable[..., Any], state: Any) -> None:
        self._fn, self._state = fn, state
        lift_weights(fn)
        lift_state(state)

    def __call__(self, batch: Any) -> Any:
        with environment():
            made = self._fn(self._state, lift_tree(batch))
        return made if stays_on_device() else to_host(made)


class Program:
    """The compiled step of one kind of batch; over a mesh of several devices, each runs it on its parts."""

    def __init__(
        self, fn: Callable[..., Any], state: Any, batch: Any, weights: Sequence[Any], mesh: Mesh | None = None
    ) -> None:
        self._fn, self._state, self._weights = fn, state, weights
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._batch = map_tensors(batch, lambda _, x: torch.empty_like(x, device="meta"), "")  # its shape, and no data
        self._where = everywhere(self._mesh)
        self._result: Any = None
        self._run = jax.jit(self._over_mesh if self._mesh else self._traced, donate_argnums=1)

    def __call__(self, batch: Any) -> Any:
        outputs, changed = self._run(*self._arguments(batch))
        for tensor, value in zip(self._state.mutable_tensors(), changed, strict=True):
            tensor._elem = value
        return self._results(outputs)

    def lower(self, batch: Any, mesh: Mesh) -> tuple[jax.stages.Lowered, Any]:
        """The program, ready to be compiled for devices that need not be there, and the shapes of what a call gives.

        Of weights, state and batch only the shapes count, and how they lie on the mesh.
        """
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(x))),
            self._arguments(batch),
        )
        kernels_ask = nullcontext() if self._mesh else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        with kernels_ask:  # Pallas asks it what it compiles for; `shard_map` says it by itself
            traced = self._run.trace(*shapes)
            lowered = traced.lower()
        outputs, _ = traced.out_info
        return lowered, self._results([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs])

    def _arguments(self, batch: Any) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        mutable = self._state.mutable_tensors()
        inputs = [array(lift(x, self._where)) for x in _tensors(batch)]
        return [array(w) for w in self._weights], [array(m) for m in mutable], inputs

    def _results(self, outputs: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> Any:
        made = iter(outputs)
        return map_tensors(self._result, lambda _path, _x: wrap(next(made)), "")

    def _over_mesh(
        self, weights: list[jax.Array], mutable: list[jax.Array], inputs: list[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        on_weights, on_state = (
            [spec_of(array(x)) for x in held] for held in (self._weights, self._state.mutable_tensors())
        )
        # What a step gives is alike on all ranks, as collectives make it: jax cannot see that through every operator.
        run = jax.shard_map(
            self._traced,
            mesh=self._mesh,
            in_specs=(on_weights, on_state, EVERYWHERE),
            out_specs=(EVERYWHERE, on_state),
            check_vma=False,
        )
        made: tuple[list[jax.Array], list[jax.Array]] = run(weights, mutable, inputs)
        return made

    def _traced(
        self, weights: list[jax.Array], mutable: list[jax.Array], inputs: list[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        state = list(self._state.mutable_tensors())
        given = iter(inputs)
        held = standing_for([*self._weights, *state], [*weights, *mutable])
        with held, environment(), traced_over(self._mesh):
            batch = map_tensors(self._batch, lambda _path, _x: wrap(next(given)), "")
            result = self._fn(self._state, batch)
            outputs = [array(x) for x in _tensors(result)]
            changed = [array(x) for x in state]
        self._result = map_tensors(result, lambda _, x: torch.empty(0, device="meta"), "")
        return outputs, changed


@contextmanager
def standing_for(tensors: Sequence[Any], values: Sequence[jax.Array]) -> Iterator[None]:
    """Meanwhile each tensor is one of `values`: what a trace gives stands where the model looks."""
    kept = [tensor._elem for tensor in tensors]
    for tensor, value in zip(tensors, values, strict=True):
        tensor._elem = value
    try:
        yield
    finally:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor._elem = value


def lift_weights(fn: Callable[..., Any]) -> list[Any]:
    """Moves what the modules of a step hold to the device, each tensor once, and gives them: in the order of the modules."""
    moved: dict[int, Any] = {}
    lifted: dict[int, Any] = {}
    for _, module in step_modules(fn):
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    moved[id(tensor)] = lift(tensor)
                on = held[name] = moved[id(tensor)]
                lifted[id(on)] = on
    return list(lifted.values())


def lift_state(state: Any, mesh: Mesh | None = None) -> None:
    """What a state holds itself, on each device of a mesh; its pools were made there."""
    for name in state.__dataclass_fields__:
        value = getattr(state, name)
        if isinstance(value, Tensor):
            setattr(state, name, lift(value, everywhere(mesh)))


def _kind(batch: Any) -> Hashable:
    return tuple((path, (x.shape, x.dtype) if isinstance(x, Tensor) else x) for path, x in leaves(batch, ""))


def _tensors(tree: Any) -> list[Tensor]:
    return [x for _, x in leaves(tree, "") if isinstance(x, Tensor)]
