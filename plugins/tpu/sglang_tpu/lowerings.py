"""Operators of PyTorch that the core's op bodies use and torchax does not know, or takes fewer arguments for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax import tensor
from torchax.config import Configuration
from torchax.ops.mappings import t2j_dtype
from torchax.ops.op_base import InplaceOp
from torchax.ops.ops_registry import Operator

from sglang_tpu.environment import array, environment, lift, lift_tree, wrap
from sglang_tpu.rounding import FP8, divided, to_fp8

aten = torch.ops.aten

IN_PLACE = {aten.exp_: aten.exp, aten.index_fill_: aten.index_fill}


def searchsorted(sorted_sequence: Any, values: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    """sorted_sequence: [..., N], values: [..., n]. Indices are int32 on this device, whichever was asked for."""
    rows, wanted = array(sorted_sequence), array(values)
    find = partial(jnp.searchsorted, side="right" if right else "left")
    for _ in range(rows.ndim - 1):
        find = jax.vmap(find)
    return wrap(find(rows, wanted).astype(jnp.int32))


def bitwise(fn: Callable[[jax.Array, Any], jax.Array]) -> Callable[[Any, Any], Any]:
    """torchax takes `&` for a logical "and" where it meets it as this operator."""
    return lambda x, y: wrap(fn(array(x), array(y) if isinstance(y, torch.Tensor) else y))


def divide(x: Any, y: Any) -> Any:
    """True division of tensors and numbers."""
    a, b = (array(lift(each)) if isinstance(each, torch.Tensor) else each for each in (x, y))
    floats = isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.floating)
    return wrap(divided(a, b) if floats else jnp.divide(a, b))


def to_dtype(x: Any, dtype: torch.dtype | None = None, *_: Any, **__: Any) -> Any:
    """A copy in that dtype, or in its own; nothing else of a tensor can be asked for here."""
    found = array(x)
    if dtype == torch.float8_e4m3fn and found.dtype != FP8:
        return wrap(to_fp8(found))
    return wrap(found if dtype is None else found.astype(t2j_dtype(dtype)))


LOWERINGS = {
    **{op: bitwise(jnp.bitwise_and) for op in (aten.__and__.Tensor, aten.__and__.Scalar)},
    **{op: bitwise(jnp.bitwise_or) for op in (aten.__or__.Tensor, aten.__or__.Scalar)},
    **{op: bitwise(jnp.bitwise_xor) for op in (aten.__xor__.Tensor, aten.__xor__.Scalar)},
    aten.searchsorted.Tensor: searchsorted,
    aten.div.Tensor: divide,
    **dict.fromkeys((aten.to.dtype, aten._to_copy.default), to_dtype),
    aten.square: lambda x: wrap(jax.lax.square(array(x))),
}


def dispatch_anywhere(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """torchax's tensors refuse to be used outside of its environment. Here they enter it: what a step returns is a tensor like others."""
    env = environment()
    with env:
        return env.dispatch(func, types, *lift_tree((args, kwargs or {})))


class Environment(tensor.Environment):
    """torchax's, with the lowerings of this file. Operators that are made of others are taken apart in inference mode too."""

    def __init__(self) -> None:
        # A view of theirs is no tensor to whoever is given it, and nothing of the core's writes through one.
        super().__init__(Configuration(force_materialize_views=True))
        tensor.Tensor.__torch_dispatch__ = staticmethod(dispatch_anywhere)
        for op, functional in IN_PLACE.items():
            self.override_op_definition(op, InplaceOp(functional), is_view_op=True)
        for op, fn in LOWERINGS.items():
            self.override_op_definition(op, fn)

    def tensor(self, x: jax.Array | jax.ShapeDtypeStruct) -> tensor.Tensor:
        return tensor.Tensor(x, self)

    def _get_op_or_decomp(self, func: Any) -> Any:
        try:
            return super()._get_op_or_decomp(func)
        except tensor.OperatorNotFound:
            if not isinstance(func, torch._ops.OpOverload) or not func._can_decompose():
                raise
            return Operator(
                func, func.decompose, is_jax_function=False, is_user_defined=False, needs_env=False, is_view_op=True
            )
