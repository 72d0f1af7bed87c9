"""From a chosen kernel to a plain Python function: importing it, and choosing between variants by T."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from sglang_core.backend.candidates import kernel_title
from sglang_core.backend.kernel import Kernel
from sglang_core.errors import PluginError


def import_target(kernel: Kernel, target: str) -> Callable[..., Any]:
    """The function behind "module:function". Raises PluginError naming the kernel and the cause."""
    module, _, name = target.partition(":")
    try:
        found = attrgetter(name)(importlib.import_module(module))
    except (Exception, SystemExit) as e:
        raise PluginError(
            f"kernel {kernel_title(kernel)} was chosen for {kernel.op}, and {target} cannot be imported: {type(e).__name__}: {e};"
            f" repair its package, or choose another with --kernel {kernel.op}=PROVIDER"
        ) from e
    if not callable(found):
        raise PluginError(f"kernel {kernel_title(kernel)} for {kernel.op}: {target} is no function, but {found!r}")
    return found  # type: ignore[no-any-return]


def bind_kernels(kernels: Sequence[Kernel], body: Callable[..., Any]) -> Callable[..., Any]:
    """What a layer calls. One kernel without a range is called directly; variants cost a look at T; `body` fills holes."""
    functions = [import_target(kernel, kernel.fn) for kernel in kernels]
    if kernels[0].tokens is None:
        return functions[0]
    variants = [(*_bounds(kernel), fn) for kernel, fn in zip(kernels, functions, strict=True)]
    if kernels[-1].tokens is not None:
        variants.append((0, sys.maxsize, body))

    def by_num_tokens(x: Any, *args: Any, **kwargs: Any) -> Any:
        t = x.shape[0]
        for low, high, fn in variants:
            if low <= t <= high:
                return fn(x, *args, **kwargs)
        raise AssertionError(f"no variant for T={t}")

    return by_num_tokens


def _bounds(kernel: Kernel) -> tuple[int, int]:
    """Inclusive bounds of T. An empty batch goes where one token goes."""
    if kernel.tokens is None:
        return 0, sys.maxsize
    low, high = kernel.tokens
    return (0 if low == 1 else low), (sys.maxsize if high is None else high)
