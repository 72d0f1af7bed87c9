"""Walking what a step is given: dataclasses, mappings, lists and tuples of tensors and static values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, leaf) in a fixed order; what is no container is a leaf."""
    for name, child in _children(tree):
        yield from leaves(child, path + name)
    if not _is_container(tree):
        yield path, tree


def map_tensors(tree: Any, fn: Callable[[str, Tensor], Tensor], path: str) -> Any:
    """A copy of the tree with every tensor replaced; objects that are no container stay themselves."""
    if isinstance(tree, Tensor):
        return fn(path, tree)
    mapped = {name: map_tensors(child, fn, path + name) for name, child in _children(tree)}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{name[1:]: child for name, child in mapped.items()})
    if isinstance(tree, Mapping):
        return dict(zip(tree, mapped.values(), strict=True))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*mapped.values())
    return type(tree)(mapped.values()) if isinstance(tree, (list, tuple)) else tree


def _is_container(tree: Any) -> bool:
    return isinstance(tree, (Mapping, list, tuple)) or (dataclasses.is_dataclass(tree) and not isinstance(tree, type))


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        yield from ((f".{f.name}", getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init)
    elif isinstance(tree, Mapping):
        yield from ((f"[{i}]", child) for i, child in enumerate(tree.values()))
    elif isinstance(tree, (list, tuple)):
        yield from ((f"[{i}]", child) for i, child in enumerate(tree))
