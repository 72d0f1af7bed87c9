"""`StrictRuntime`: steps of static shape, traced before they run; pools full of NaN; writes only where `state` says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sglang_core.backend.interface import Bucket, RuntimeContext
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.backend.strict_trace import StrictError, trace_step
from sglang_core.backend.tensor_tree import leaves
from sglang_core.backend.torch_runtime import TorchRuntime

VARIANTS_PER_BUCKET = 4  # which optional inputs are there, and static parts of a plan
Signature = tuple[tuple[str, str], ...]  # (path, shape and dtype or the static value)


class MutableState(Protocol):
    """What a step is given to change: every tensor that may differ after it."""

    def mutable_tensors(self) -> Any: ...


class StrictRuntime(TorchRuntime):
    """The host CPU with the rules of every compiling device.

    A step is traced once per signature (shapes, dtypes and static values of its input) and then run eagerly: it may read no
    value on the host, write nothing that its state does not declare, keep nothing, and see only as many signatures as
    its buckets allow.
    """

    poisons_freed_pages = True

    def __init__(self, ctx: RuntimeContext) -> None:
        super().__init__(ctx, "cpu")

    def buckets(self, *, max_num_tokens: int, max_num_reqs: int, max_num_pages: int) -> Sequence[Bucket]:
        """Decode by reqs and prefill by tokens, in powers of four: few, so that tracing them all takes seconds."""
        decode = [
            Bucket(num_tokens=r, num_reqs=r, max_extend=1, num_pages=max_num_pages)
            for r in _powers_of_four(max_num_reqs)
        ]
        prefill = [
            Bucket(num_tokens=t, num_reqs=max_num_reqs, max_extend=t, num_pages=max_num_pages)
            for t in _powers_of_four(max_num_tokens)
            if t > 1
        ]
        return decode + prefill

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        pool = super().alloc_pool(spec, num_pages)
        pool.poison(range(num_pages))
        return pool

    def alloc_state_pool(self, spec: StatePoolSpec, num_slots: int) -> StatePool:
        pool = super().alloc_state_pool(spec, num_slots)
        pool.poison(range(num_slots))
        return pool

    def compile_step(
        self, fn: Callable[..., Any], state: MutableState, buckets: Sequence[Bucket]
    ) -> Callable[..., Any]:
        return _StrictStep(fn, state, len(buckets) * VARIANTS_PER_BUCKET)


class _StrictStep:
    """One step function and what is known of it."""

    def __init__(self, fn: Callable[..., Any], state: MutableState, max_signatures: int) -> None:
        self._fn, self._state, self._max_signatures = fn, state, max_signatures
        self._signatures: dict[Signature, list[Tensor]] = {}  # -> outside tensors that the step reads

    def __call__(self, forward_batch: Any) -> Any:
        signature = _signature(forward_batch)
        if signature not in self._signatures:
            self._signatures[signature] = self._trace(signature, forward_batch)
        read = [t for t in self._signatures[signature] if not t.is_inference()]
        read += [t for _, t in leaves(forward_batch, "") if isinstance(t, Tensor) and not t.is_inference()]
        declared = list(self._state.mutable_tensors())
        read = [t for t in read if not any(t is m for m in declared)]
        before = [t._version for t in read]
        with torch.no_grad():
            out = self._fn(self._state, forward_batch)
        for t, version in zip(read, before, strict=True):
            if t._version != version:
                raise StrictError(
                    f"the step changed a {t.dtype} tensor {list(t.shape)} that `state` does not declare; only"
                    " state.mutable_tensors() may change in a step"
                )
        return out

    def _trace(self, signature: Signature, forward_batch: Any) -> list[Tensor]:
        if self._max_signatures and len(self._signatures) >= self._max_signatures:
            raise StrictError(
                f"the step met {len(self._signatures) + 1} signatures, and its buckets allow {self._max_signatures}; pad to"
                f" a bucket, and make values that vary tensors: {self._varying(signature)}"
            )
        kept = _attributes(self._fn)
        declared = list(self._state.mutable_tensors())
        read = trace_step(self._fn, self._state, forward_batch, declared)
        if any(a is not b for a, b in zip(declared, self._state.mutable_tensors(), strict=True)):
            raise StrictError("the step rebinds a tensor of its state; write it in place, with index_put_ or copy_")
        if changed := [name for name, value in _attributes(self._fn).items() if kept.get(name) != value]:
            raise StrictError(
                f"the step sets {', '.join(changed)}; a step keeps nothing but what it writes to its state"
            )
        return read

    def _varying(self, signature: Signature) -> str:
        """The inputs that took most values, by path."""
        values: dict[str, set[str]] = {}
        for path, value in [pair for known in (*self._signatures, signature) for pair in known]:
            values.setdefault(path, set()).add(value)
        most = sorted(values, key=lambda path: -len(values[path]))[:3]
        return ", ".join(
            f"{path} took {len(values[path])} ({', '.join(sorted(values[path])[:3])}, ...)" for path in most
        )


def _signature(forward_batch: Any) -> Signature:
    return tuple((path, _static_part(leaf)) for path, leaf in leaves(forward_batch, "forward_batch"))


def _static_part(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype}{list(leaf.shape)}"
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype)):
        return repr(leaf)
    return type(leaf).__qualname__


def _attributes(fn: Callable[..., Any]) -> dict[str, int]:
    """Tensors that the modules behind a step function hold as attributes: name -> identity."""
    found: dict[str, int] = {}
    for module in _modules(fn):
        for name, sub in module.named_modules():
            held = {**vars(sub), **sub._parameters, **sub._buffers}
            title = ".".join(part for part in (type(module).__name__, name) if part)
            found |= {f"{title}.{key}": id(value) for key, value in held.items() if isinstance(value, Tensor)}
    return found


def _modules(fn: Any) -> list[torch.nn.Module]:
    """Modules that a function, method, partial or callable object reaches directly."""
    owner = getattr(fn, "__self__", fn)
    cells = [cell.cell_contents for cell in getattr(fn, "__closure__", None) or ()]
    held = [owner, getattr(fn, "func", None), *cells, *getattr(owner, "__dict__", {}).values()]
    return [value for value in held if isinstance(value, torch.nn.Module)]


def _powers_of_four(limit: int) -> list[int]:
    sizes = [4**i for i in range(16) if 4**i < limit]
    return [*sizes, limit]
