"""What kernels do behind PyTorch's back, in the first real run of each signature.

A kernel that is a `torch.library` op says in its schema what it writes. Here every other tensor that it is handed is compared before
and after, and so is the memory around what it may write. What a step allocates is full of NaN and lies between guards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_core.backend.strict_memory import as_bytes, guarded, guards_hold, same_bytes
from sglang_core.backend.strict_trace import StrictError

ALLOCATORS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
OURS = ("aten", "prims", "prim", "inductor", "_c10d_functional", "c10d")


class KernelWatch(TorchDispatchMode):
    """Active around one run of a step; `check` once it is over."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allocated: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in OURS:
            return _watched(func, args, kwargs)
        out = func(*args, **kwargs)
        if func._schema.name in ALLOCATORS and isinstance(out, Tensor) and out.layout is torch.strided:
            out = guarded(out)
            self._allocated.append((func._schema.name, out))
        return out

    def check(self) -> None:
        for name, t in self._allocated:
            if not guards_hold(t):
                raise StrictError(
                    f"a kernel wrote outside its output: next to a tensor that the step made by {name} ({t.dtype}"
                    f" {list(t.shape)}); bound its loops by the output's shape, not by the tile's"
                )


def _watched(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a kernel. Raises StrictError where it changes what its schema does not say."""
    given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
    before = []
    for argument, value in given:
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(t, Tensor):
                written = argument.alias_info is not None and argument.alias_info.is_write
                before.append((argument.name, t, written, _storage(t).clone(), as_bytes(t).clone()))
    out = func(*args, **kwargs)
    for name, t, written, storage, own in before:
        if not written and not same_bytes(_storage(t), storage):
            raise StrictError(
                f"{func} changed its argument {name!r} ({t.dtype} {list(t.shape)}), which its schema does not say; write to outputs"
                " only, or name it in mutates_args where the op may change it"
            )
        if written:
            now = t.clone()
            t.copy_(own.view(t.dtype).view(t.shape))  # only what lies around it is looked at
            around = same_bytes(_storage(t), storage)
            t.copy_(now)
            if not around:
                raise StrictError(
                    f"{func} wrote outside its argument {name!r} ({t.dtype} {list(t.shape)}, strides {list(t.stride())}): honour"
                    " its strides, and bound its loops by its shape"
                )
    return out


def _storage(t: Tensor) -> Tensor:
    """All bytes of the memory that t is part of."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
