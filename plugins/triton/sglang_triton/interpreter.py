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
    interpreter.InterpreterBuilder.create_fma = _fma(interpreter.InterpreterBuilder.create_fma)


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


def _fma(theirs: Any) -> Any:
    """Releases before 3.9 round a product before they add to it. In float64 it is exact; a sum that is not, made odd in its last bit, rounds to
    float32 as the exact one does (Boldo and Melquiond).
    """

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return theirs(self, x, y, z)
        with np.errstate(invalid="ignore", over="ignore"):
            product, added = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
            total = np.asarray(product + added)
            part = total - product
            lost = (product - (total - part)) + (added - part)
            odd = (total.view(np.int64) & 1) != 0
            away = np.nextafter(total, np.copysign(np.inf, lost))
            total = np.where(np.isfinite(lost) & (lost != 0) & ~odd, away, total)
            return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)

    return create_fma
