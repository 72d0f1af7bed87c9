"""torchax, which gives arrays of JAX PyTorch's operators: how it is imported, and what crosses to and from the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from sglang_core.api import map_tensors
from sglang_core.api.ops import PackedWeight

# What NumPy has no name for: PyTorch's dtype -> (PyTorch's integer of that width, the dtype that JAX knows).
EXTENDED = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
OF_JAX = {np.dtype(theirs): (carrier, ours) for ours, (carrier, theirs) in EXTENDED.items()}


class _Gone:
    """Stands for an overload that this PyTorch no longer has: a key of torchax's tables that nothing ever asks for."""


@contextmanager
def _gone_overloads() -> Iterator[None]:
    """torchax's tables list overloads for named tensors, which PyTorch 2.13 took out (github.com/google/torchax/issues/101).

    Meanwhile an overload that is not there is stood in for.
    """
    packet = torch._ops.OpOverloadPacket
    found = packet.__getattr__

    def look_up(self: Any, key: str) -> Any:
        try:
            return found(self, key)
        except AttributeError:
            if key.startswith("_"):
                raise
            return _Gone()

    packet.__getattr__ = look_up  # type: ignore[method-assign]
    try:
        yield
    finally:
        packet.__getattr__ = found  # type: ignore[method-assign]


@cache
def environment() -> Any:
    """The process's torchax environment. It is entered where steps run and nowhere else: globally it would take over every tensor."""
    with _gone_overloads():
        from sglang_tpu.lowerings import Environment

        return Environment()


_thread = threading.local()


def stay_on_device() -> None:
    """For a thread that runs steps: results of the device stay there, and PyTorch's functions take them."""
    environment().enable_torch_modes()
    _thread.of_device = True


def stays_on_device() -> bool:
    return getattr(_thread, "of_device", False)


def is_lifted(x: Any) -> bool:
    """Whether x is a tensor of JAX, or a view of one."""
    return type(x).__module__.startswith("torchax.")


def to_jax(x: Tensor, where: jax.Device | jax.sharding.Sharding | None = None) -> jax.Array:
    """A copy of a host tensor on the device, or where it is said: what it was made from may change at once."""
    x = x.detach().clone(memory_format=torch.contiguous_format)  # on the host's own device JAX aliases what it is given
    if x.dtype in EXTENDED:
        carrier, theirs = EXTENDED[x.dtype]
        return jax.device_put(x.view(carrier).numpy().view(theirs), where)
    return jax.device_put(x.numpy(), where)


def to_torch(x: jax.Array) -> Tensor:
    """A copy on the host. Waits for the array."""
    values = np.array(x)
    if values.dtype in OF_JAX:
        carrier, ours = OF_JAX[values.dtype]
        return torch.from_numpy(values.view(np.int16 if carrier is torch.int16 else np.uint8)).view(ours)
    return torch.from_numpy(values)


def wrap(x: jax.Array | jax.ShapeDtypeStruct) -> Any:
    """The tensor that an array is, or the shape of one: that can be traced with, and not computed."""
    return environment().tensor(x)


def array(x: Any) -> jax.Array:
    """The array of a lifted tensor, or of a view of one."""
    found: jax.Array = x.jax()
    return found


def shape_of(x: Tensor) -> jax.ShapeDtypeStruct:
    """x, as a program's signature has it."""
    dtype = EXTENDED[x.dtype][1] if x.dtype in EXTENDED else str(x.dtype).removeprefix("torch.")
    return jax.ShapeDtypeStruct(tuple(x.shape), dtype)


def lift(x: Tensor, where: jax.sharding.Sharding | None = None) -> Any:
    """A host tensor on the device, or where it is said; a lifted one as it is. One without values stays one."""
    if is_lifted(x):
        return x
    return wrap(shape_of(x) if x.is_meta else to_jax(x, where))


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Any:
    """A lifted tensor, made on the device."""
    with environment():
        return torch.zeros(tuple(shape), dtype=dtype, device="jax")


def lift_tree(tree: Any) -> Any:
    """The same, with every tensor on the device. A weight's buffers are its own: it is another weight."""
    if isinstance(tree, PackedWeight):
        return PackedWeight(
            tree.fmt,
            {name: lift(x) for name, x in tree._buffers.items() if x is not None},
            out_features=tree.out_features,
            in_features=tree.in_features,
            num_experts=tree.num_experts,
            layout=tree.layout,
        )
    return map_tensors(tree, lambda _, x: lift(x), "")


def to_host(tree: Any) -> Any:
    """The same, with every tensor of the device copied to the host. Waits for it."""
    return map_tensors(tree, lambda _, x: to_torch(array(x)) if is_lifted(x) else x, "")


def _any_lifted(tree: Any) -> bool:
    found = False

    def look(_: str, x: Tensor) -> Tensor:
        nonlocal found
        found = found or is_lifted(x)
        return x

    for each in tree:
        if isinstance(each, PackedWeight):
            found = found or any(is_lifted(x) for x in each._buffers.values())
        else:
            map_tensors(each, look, "")
    return found


def on_device(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, which works on lifted tensors, for callers that have either kind: given host tensors, it gives such."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if _any_lifted((*args, *kwargs.values())):
            return fn(*args, **kwargs)
        lifted = [lift_tree(x) for x in args]
        with environment():
            made = fn(*lifted, **{name: lift_tree(x) for name, x in kwargs.items()})
        return to_host(made)

    call.__doc__, call.__name__ = fn.__doc__, fn.__name__
    return call
