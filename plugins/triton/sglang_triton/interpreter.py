"""Triton's interpreter, made quick enough to run on every change, and its products independent of where a row lies."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class Kept:
    """In place of Triton's record of what it patched: nothing is given back."""

    def restore(self) -> None:
        return


@functools.cache
def quicken() -> None:
    """Patch `triton.language` for the interpreter now, for good, and not once more at each launch and each call of a jitted function.

    Every `tl.sum` is such a call, and patching takes 1.5 ms, which was nine tenths of the time of a conformance run. A process
    that interprets compiles nothing, so nobody misses what was there. Results are the same.
    """
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    # Triton 3.6 says int() of an array of one element, which NumPy 2.4 refuses: a bound of range() is such a one.
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang = lambda fn: Kept()
    interpreter.InterpreterBuilder.create_dot = _dot(interpreter.InterpreterBuilder.create_dot)


def _dot(theirs: Any) -> Any:
    """A host's BLAS adds up a row in an order that depends on its place in the tile, a GPU's matrix unit does not: sums are taken in float64
    and rounded once.
    """

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if d.data.dtype != np.float32:
            return theirs(self, a, b, d, *options)
        wide = interpreter.TensorHandle(np.zeros((1, 1)), tl.float64)
        made = theirs(self, a, b, wide, *options)
        return interpreter.TensorHandle(made.data.astype(np.float32) + d.data, d.dtype.scalar)

    return create_dot
