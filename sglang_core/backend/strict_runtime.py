"""`StrictRuntime`: steps of static shape, traced before they run; pools full of NaN; writes only where `state` says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sglang_core.backend.interface import Bucket, RuntimeContext, Stream
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.backend.step_modules import step_modules
from sglang_core.backend.strict_kernels import KernelWatch
from sglang_core.backend.strict_memory import Pools, check_slots, same_bytes
from sglang_core.backend.strict_stream import Races, StrictStream
from sglang_core.backend.strict_trace import StrictError, trace_step
from sglang_core.backend.tensor_tree import leaves
from sglang_core.backend.torch_runtime import TorchRuntime

VARIANTS_PER_BUCKET = 8  # which optional inputs are there, and static parts of a plan
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
        self._pools, self._races = Pools(), Races()

    def stream(self) -> Stream:
        return StrictStream(self._races, super().stream())

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
        self._pools.add(pool)
        self._races.watch(pool)
        return pool

    def alloc_state_pool(self, spec: StatePoolSpec, num_slots: int) -> StatePool:
        pool = super().alloc_state_pool(spec, num_slots)
        self._pools.add(pool)
        self._races.watch(pool)
        return pool

    def compile_step(
        self, fn: Callable[..., Any], state: MutableState, buckets: Sequence[Bucket]
    ) -> Callable[..., Any]:
        return _StrictStep(fn, state, buckets, self._pools, self._races)


class _StrictStep:
    """One step function and what is known of it."""

    def __init__(
        self, fn: Callable[..., Any], state: MutableState, buckets: Sequence[Bucket], pools: Pools, races: Races
    ) -> None:
        self._fn, self._state, self._pools, self._races = fn, state, pools, races
        self._max_signatures = len(buckets) * VARIANTS_PER_BUCKET
        self._rows = {n for b in buckets for n in (b.num_tokens, b.num_reqs)}
        self._signatures: dict[Signature, list[Tensor]] = {}  # -> outside tensors that the step reads

    def __call__(self, forward_batch: Any) -> Any:
        with _disable_current_modes():  # what a stream's mode would see, this knows
            return self._call(forward_batch)

    def _call(self, forward_batch: Any) -> Any:
        declared = list(self._state.mutable_tensors())
        self._races.touch(declared, writes=True)  # before the trace: whoever comes meanwhile is refused
        signature = _signature(forward_batch)
        first = signature not in self._signatures
        if first:
            self._check_input(forward_batch)
            self._signatures[signature] = self._trace(signature, forward_batch)
        watch = self._pools.watch(declared)
        check_slots(watch.pools, forward_batch)
        given = [t for _, t in leaves(forward_batch, "") if isinstance(t, Tensor)]
        read = [t for t in (*self._signatures[signature], *given) if not any(t is m for m in declared)]
        self._races.touch(read, writes=False)
        out = self._run_first(forward_batch, read) if first else self._run(forward_batch, read)
        watch.check(forward_batch)
        watch.move()
        self._races.touch(self._state.mutable_tensors(), writes=True)
        return out

    def _run(self, forward_batch: Any, read: list[Tensor]) -> Any:
        read = [t for t in read if not t.is_inference()]  # others have no version
        before = [t._version for t in read]
        with torch.no_grad():
            out = self._fn(self._state, forward_batch)
        for t, version in zip(read, before, strict=True):
            if t._version != version:
                raise self._undeclared(t, "changed")
        return out

    def _run_first(self, forward_batch: Any, read: list[Tensor]) -> Any:
        """With a look at every byte, and at what each kernel does."""
        before = [t.clone() for t in read]
        with KernelWatch() as kernels:
            out = self._run(forward_batch, read)
        kernels.check()
        for t, old in zip(read, before, strict=True):
            if not same_bytes(t, old):
                raise self._undeclared(t, "wrote, by a pointer that PyTorch does not see, to")
        again = self._run(forward_batch, read)
        for (path, a), (_, b) in zip(leaves(out, "its result"), leaves(again, ""), strict=True):
            if isinstance(a, Tensor) and not same_bytes(a, b):
                raise StrictError(
                    f"{path} differs when the same step runs twice: it reads memory that nobody wrote (torch.empty), or what it has"
                    " overwritten (a recurrent state goes from a read slot to another write slot), or a kernel's sums race"
                )
        return out

    def _undeclared(self, t: Tensor, verb: str) -> StrictError:
        title = _names(self._fn).get(id(t), "an input or constant")
        return StrictError(
            f"the step {verb} {title}, a {t.dtype} tensor {list(t.shape)} that `state` does not declare; only"
            " state.mutable_tensors() may change in a step"
        )

    def _check_input(self, forward_batch: Any) -> None:
        """What holds for a batch whatever its bucket."""
        found = list(leaves(forward_batch, "forward_batch"))
        held = [(f"tensor {i} of the state", t) for i, t in enumerate(self._state.mutable_tensors())]
        for path, leaf in found + held:
            if isinstance(leaf, Tensor) and leaf.dtype is torch.int64:
                raise StrictError(f"{path} is int64 {list(leaf.shape)}; ids, positions and indices are int32")
        first = next(((path, leaf) for path, leaf in found if isinstance(leaf, Tensor) and leaf.dim()), None)
        if self._rows and first is not None and len(first[1]) not in self._rows:
            rows = ", ".join(map(str, sorted(self._rows)))
            raise StrictError(
                f"{first[0]} has {len(first[1])} rows, and the buckets have tokens or reqs of {rows}; pad to a bucket"
            )

    def _trace(self, signature: Signature, forward_batch: Any) -> list[Tensor]:
        if self._max_signatures and len(self._signatures) >= self._max_signatures:
            raise StrictError(
                f"the step met {len(self._signatures) + 1} signatures, and its buckets allow {self._max_signatures}; pad to"
                f" a bucket, and make values that vary tensors: {self._varying(signature)}"
            )
        kept = _attributes(self._fn)
        declared = list(self._state.mutable_tensors())
        traced = trace_step(self._fn, self._state, forward_batch, declared, _names(self._fn))
        if any(a is not b for a, b in zip(declared, self._state.mutable_tensors(), strict=True)):
            raise StrictError("the step rebinds a tensor of its state; write it in place, with index_put_ or copy_")
        if changed := [name for name, value in _attributes(self._fn).items() if kept.get(name) != value]:
            raise StrictError(
                f"the step sets {', '.join(changed)}; a step keeps nothing but what it writes to its state"
            )
        if traced.kept:
            raise StrictError(
                f"{traced.kept[0]}, outlives the step that made it (in a global, a cache or a list): a replay would give it"
                " again; return it, or write it to the state"
            )
        self._check_constants(traced.read, forward_batch)
        return traced.read

    def _check_constants(self, read: list[Tensor], forward_batch: Any) -> None:
        """What a step reads is an input, of a pool, or registered where a runtime finds it to lift it."""
        given = {id(t) for _, t in leaves(forward_batch, "")}
        known = given | self._pools.constants() | _registered(self._fn)
        for t in read:
            if id(t) not in known:
                title = _names(self._fn).get(id(t), "a closure's, a global's or a default argument's")
                raise StrictError(
                    f"the step reads a constant that no module registers: {title}, {t.dtype} {list(t.shape)}; a compiler would put it"
                    " into every program: self.register_buffer(name, tensor, persistent=False)"
                )

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
    return tuple((path, _static_part(path, leaf)) for path, leaf in leaves(forward_batch, "forward_batch"))


def _static_part(path: str, leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype}{list(leaf.shape)}"
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype)):
        return repr(leaf)
    try:
        hash(leaf)
    except TypeError as e:
        raise StrictError(
            f"{path} is a {type(leaf).__qualname__}, which cannot be hashed; what is no tensor joins the compile key: make it a"
            " tuple or a frozen dataclass"
        ) from e
    return type(leaf).__qualname__


def _attributes(fn: Callable[..., Any]) -> dict[str, tuple[int, int]]:
    """What the modules behind a step function hold: name -> identity, and length where it has one."""
    found: dict[str, tuple[int, int]] = {}
    for title, module in step_modules(fn):
        held = {**vars(module), **module._parameters, **module._buffers}
        for key, value in held.items():
            found[f"{title}.{key}"] = id(value), len(value) if isinstance(value, (list, dict, set)) else -1
    return found


def _names(fn: Callable[..., Any]) -> dict[int, str]:
    """id of each module and of the tensors that it holds, behind a step function -> what it is called."""
    found: dict[int, str] = {}
    for title, module in step_modules(fn):
        found.setdefault(id(module), title)
        for name, t in {**vars(module), **module._parameters, **module._buffers}.items():
            if isinstance(t, Tensor):
                found.setdefault(id(t), f"{title}.{name}")
    return found


def _registered(fn: Callable[..., Any]) -> set[int]:
    """ids of the tensors that a runtime finds as parameters and buffers, and so can lift."""
    modules = [module for _, module in step_modules(fn)]
    return {id(t) for module in modules for t in (*module._parameters.values(), *module._buffers.values())}


def _powers_of_four(limit: int) -> list[int]:
    sizes = [4**i for i in range(16) if 4**i < limit]
    return [*sizes, limit]
