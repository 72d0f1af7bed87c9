"""Which modules, and so which weights, a step function stands on: what a runtime lifts into the arguments of what it compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def step_modules(fn: Callable[..., Any]) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the modules that a step function, method, partial or callable object reaches, children after parents.

    One that several reach comes once for each. A step reads no tensor but its input's, its state's and their registered ones.
    """
    for module in _directly(fn):
        for name, sub in module.named_modules():
            yield ".".join(part for part in (type(module).__name__, name) if part), sub


def _directly(fn: Any) -> list[nn.Module]:
    owner = getattr(fn, "__self__", fn)
    cells = [cell.cell_contents for cell in getattr(fn, "__closure__", None) or ()]
    held = [owner, getattr(fn, "func", None), *cells, *getattr(owner, "__dict__", {}).values()]
    return [value for value in held if isinstance(value, nn.Module)]
