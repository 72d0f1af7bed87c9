"""What every call of an op is held to, whatever its results: it writes to the pools it is given and to nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sglang_core.ops.weight import PackedWeight

WATCHED_BYTES = 1 << 26  # of one input; a copy of a larger one would touch memory that a case leaves alone

OUT = "out"  # the argument of a plan that is there to be written


def guarded(op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn, which raises AssertionError where a call changed one of its inputs."""

    @functools.wraps(fn, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        small = ((name, x) for name, x in inputs(args, kwargs) if x.numel() * x.element_size() <= WATCHED_BYTES)
        given = {name: x for name, x in small if not name.startswith(OUT)}
        before = {name: x.clone() for name, x in given.items()}
        result = fn(*args, **kwargs)
        for name, x in given.items():
            assert same_bits(x, before[name]), f"{op} changes its input: {name}"
        return result

    return call


def unguarded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What a step that is compiled calls: no comparison on the host belongs into it."""
    return getattr(fn, "__wrapped__", fn)


def inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a call is given, by name, but for those in pools."""
    for name, value in (*((f"argument {i + 1}", arg) for i, arg in enumerate(args)), *kwargs.items()):
        yield from _tensors(name, value)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, PackedWeight):
        yield from ((f"{name}.{key}", tensor) for key, tensor in value.named_buffers())
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(f"{name}.{field.name}", getattr(value, field.name))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits; NaN of any bits is NaN."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.is_floating_point() and a.element_size() == 1:  # fp8 has no comparison
        return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    return torch.equal(a, b) if not a.is_floating_point() else bool(((a == b) | (a.isnan() & b.isnan())).all())
