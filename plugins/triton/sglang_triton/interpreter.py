"""Triton's interpreter, made quick enough to run on every change."""

from __future__ import annotations

from typing import Any

from triton.runtime.interpreter import InterpretedFunction


def quicken() -> None:
    """Let a jitted function call another, `tl.sum` included, without patching `triton.language` once more.

    A launch patches it before it runs the kernel, so that all that is called within finds it so; doing it again takes 1.5 ms a call,
    which was nine tenths of the time of a conformance run. Results are the same.
    """
    InterpretedFunction.__call__ = _call


def _call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)
