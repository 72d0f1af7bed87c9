"""A function of jax with its Pallas kernels interpreted: for kernels whose own functions have no way to ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src.literals import TypedInt
from jax.extend import core

# The interpreter asks an index for its shape, and one that is written in a kernel as a number has none in jax 0.10.2 (pallas/primitives.py,
# `_swap_discharge_rule`). Pallas' simulator of a TPU is no way round: it knows no reshaped references, which such kernels read.
if not hasattr(TypedInt, "shape"):
    TypedInt.shape = ()


def interpreted(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, traced for its arguments, with every `pallas_call` in it made to be interpreted."""

    def run(*args: Any) -> Any:
        traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        made = _evaluate(traced, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), made)

    return run


def _evaluate(traced: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    jaxpr = traced.jaxpr
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*traced.consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        given = [x.val if isinstance(x, core.Literal) else known[x] for x in eqn.invars]
        match eqn.primitive.name:
            case "jit" | "pjit":
                made = _evaluate(eqn.params["jaxpr"], given)
            case "pallas_call":
                made = eqn.primitive.bind(*given, **{**eqn.params, "interpret": True})
            case _:
                functions, params = eqn.primitive.get_bind_params(eqn.params)
                made = eqn.primitive.bind(*functions, *given, **params)
        known.update(zip(eqn.outvars, made if eqn.primitive.multiple_results else [made], strict=True))
    return [x.val if isinstance(x, core.Literal) else known[x] for x in jaxpr.outvars]
