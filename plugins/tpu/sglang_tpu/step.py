"""`JittedStep`: a step function traced once for each kind of batch, compiled whole by XLA."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import torch
from torch import Tensor

from sglang_core.api import leaves, map_tensors, step_modules
from sglang_tpu.environment import array, environment, lift, lift_tree, stays_on_device, to_host, wrap

log = logging.getLogger(__name__)

VARIANTS_PER_BUCKET = 8  # which optional inputs are there, and static parts of plans


class JittedStep:
    """Called as the step is. A program belongs to the shapes, dtypes and static values of its batch.

    Weights are its arguments, or XLA would copy them into each program; what the state declares is donated, so that a pool is
    changed where it is. Nothing of it is read on the host: a result is there to wait for.
    """

    def __init__(self, fn: Callable[..., Any], state: Any, num_buckets: int) -> None:
        self._fn, self._state, self._limit = fn, state, num_buckets * VARIANTS_PER_BUCKET
        self._weights = lift_weights(fn)
        lift_state(state)
        self._programs: dict[Hashable, Program] = {}

    def __call__(self, batch: Any) -> Any:
        kind = _kind(batch)
        program = self._programs.get(kind)
        if program is None:
            if 0 < self._limit <= len(self._programs):
                log.warning(
                    "a step is compiled while serving, the %dth: its batch is of no kind that the buckets have; reqs wait for it",
                    len(self._programs) + 1,
                )
            program = self._programs[kind] = Program(self._fn, self._state, batch, self._weights)
        made = program(batch)
        return made if stays_on_device() else to_host(made)


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
    """The compiled step of one kind of batch."""

    def __init__(self, fn: Callable[..., Any], state: Any, batch: Any, weights: Sequence[Any]) -> None:
        self._fn, self._state, self._weights = fn, state, weights
        self._batch = map_tensors(batch, lambda _, x: torch.empty_like(x, device="meta"), "")  # its shape, and no data
        self._result: Any = None
        self._run = jax.jit(self._traced, donate_argnums=1)

    def __call__(self, batch: Any) -> Any:
        outputs, changed = self._run(*self._arguments(batch))
        for tensor, value in zip(self._state.mutable_tensors(), changed, strict=True):
            tensor._elem = value
        return self._results(outputs)

    def lower(self, batch: Any, sharding: jax.sharding.Sharding) -> tuple[jax.stages.Lowered, Any]:
        """The program, ready to be compiled for devices that need not be there, and the shapes of what a call gives.

        Of weights, state and batch only the shapes count. All are where `sharding` says.
        """
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self._arguments(batch)
        )
        traced = self._run.trace(*shapes)
        outputs, _ = traced.out_info
        return traced.lower(), self._results([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs])

    def _arguments(self, batch: Any) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        mutable = self._state.mutable_tensors()
        return [array(w) for w in self._weights], [array(m) for m in mutable], [array(lift(x)) for x in _tensors(batch)]

    def _results(self, outputs: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> Any:
        made = iter(outputs)
        return map_tensors(self._result, lambda _path, _x: wrap(next(made)), "")

    def _traced(
        self, weights: list[jax.Array], mutable: list[jax.Array], inputs: list[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        state = list(self._state.mutable_tensors())
        given = iter(inputs)
        with standing_for([*self._weights, *state], [*weights, *mutable]), environment():
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


def lift_state(state: Any) -> None:
    """What a state holds itself; its pools were made on the device."""
    for name in state.__dataclass_fields__:
        value = getattr(state, name)
        if isinstance(value, Tensor):
            setattr(state, name, lift(value))


def _kind(batch: Any) -> Hashable:
    return tuple((path, (x.shape, x.dtype) if isinstance(x, Tensor) else x) for path, x in leaves(batch, ""))


def _tensors(tree: Any) -> list[Tensor]:
    return [x for _, x in leaves(tree, "") if isinstance(x, Tensor)]
