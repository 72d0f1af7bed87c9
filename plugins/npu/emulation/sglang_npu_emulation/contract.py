"""How an op of the vendor becomes one of the host: its schema and Meta kernel judge every call, then what its documentation asks for, then a body computes.

`emulated("npu_x")` makes a function the op's body on CPU tensors. The dispatcher matches a call with the vendor's schema. The Meta kernel sees
the same call without numbers; what it says of shapes and dtypes the body's results must have. Bodies call `require` for what is documented beyond that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
BODIES: dict[str, Callable[..., Any]] = {}
_watchers: list[Counter[str]] = []


class ContractError(ValueError):
    """A call that the vendor does not document, and that a device may refuse or get wrong."""


def require(holds: bool, what: str) -> None:
    """Raises ContractError; `what` states the vendor's rule and what was met."""
    if not holds:
        raise ContractError(what)


def require_contiguous(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        require(
            x is None or x.is_contiguous(), f"{name} must be contiguous, and has strides {x is not None and x.stride()}"
        )


def require_dtype(dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        require(x is None or x.dtype in dtypes, f"{name} may be of {dtypes}, and is of {x is not None and x.dtype}")


def emulated(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The body of npu::`op` on the host. It takes what the schema says."""

    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        assert op not in BODIES, f"{op} has two bodies"
        BODIES[op] = body
        return body

    return add


def install(library: torch.library.Library) -> None:
    """Every body becomes its op's kernel for CPU tensors, as long as `library` lives. Once a process."""
    for op, body in BODIES.items():
        library.impl(op, _checked(op, body), "CPU")


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """How often each op is called meanwhile, by every thread. A call is counted once its schema, its Meta kernel and its documentation found nothing wrong."""
    calls: Counter[str] = Counter()
    _watchers.append(calls)
    try:
        yield calls
    finally:
        _watchers.remove(calls)


def has_meta(op: str) -> bool:
    """Whether the vendor has a Meta kernel for it."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(getattr(torch.ops.npu, op).default.name(), "Meta")


def _checked(op: str, body: Callable[..., Any]) -> Callable[..., Any]:
    overload = getattr(torch.ops.npu, op).default
    meta = has_meta(op)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            expected = overload(*_on_meta(args), **_on_meta(kwargs)) if meta else None
            made = body(*args, **kwargs)
        except ContractError as e:
            raise ContractError(f"npu::{op}: {e}") from None
        if meta:
            _compare(op, made, expected)
        for calls in _watchers:
            calls[op] += 1
        return made

    return run


def _on_meta(tree: Any) -> Any:
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, tree)


def _compare(op: str, made: Any, expected: Any) -> None:
    ours, theirs = (
        [(tuple(x.shape), x.dtype) for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (made, expected)
    )
    assert ours == theirs, f"npu::{op}: its body made {ours}, and its Meta kernel says {theirs}"
