"""Walking what a step is given: dataclasses, mappings, lists and tuples of tensors and static values. Every step does, several times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, leaf) in a fixed order; what is no container is a leaf."""
    found: list[tuple[str, Any]] = []
    _collect(tree, path, found)
    return iter(found)


def map_tensors(tree: Any, fn: Callable[[str, Tensor], Tensor], path: str) -> Any:
    """A copy of the tree with every tensor replaced; objects that are no container stay themselves."""
    if isinstance(tree, Tensor):
        return fn(path, tree)
    children = _children(tree)
    if children is None:
        return tree
    mapped = {name: map_tensors(child, fn, path + name) for name, child in children}
    if _fields(type(tree)) is not None:
        return dataclasses.replace(tree, **{name[1:]: child for name, child in mapped.items()})
    if isinstance(tree, Mapping):
        return dict(zip(tree, mapped.values(), strict=True))
    if hasattr(tree, "_fields"):
        return type(tree)(*mapped.values())
    return type(tree)(mapped.values())


def _collect(tree: Any, path: str, found: list[tuple[str, Any]]) -> None:
    children = None if isinstance(tree, Tensor) else _children(tree)
    if children is None:
        found.append((path, tree))
        return
    for name, child in children:
        _collect(child, path + name, found)


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    """By name; None: no container."""
    names = _fields(type(tree))
    if names is not None:
        return [(name, getattr(tree, name[1:])) for name in names]
    if isinstance(tree, (list, tuple)):
        return [(f"[{i}]", child) for i, child in enumerate(tree)]
    if isinstance(tree, Mapping):
        return [(f"[{i}]", child) for i, child in enumerate(tree.values())]
    return None


_known: dict[type, tuple[str, ...] | None] = {}


def _fields(kind: type) -> tuple[str, ...] | None:
    """Of a dataclass, each with a dot before it; None: it is none."""
    if kind not in _known:
        is_one = dataclasses.is_dataclass(kind)
        _known[kind] = tuple(f".{f.name}" for f in dataclasses.fields(kind) if f.init) if is_one else None
    return _known[kind]
