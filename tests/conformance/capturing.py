"""A device that captures its steps, as graphs do: the ops of the first call are recorded with their tensors, and replayed on those.

What Python did in the first call is not done again. An `.item()`, a branch and a host constant keep what they were, and inputs count only
because they are copied to where the first ones lay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_core.backend.claims import Claims
from sglang_core.backend.interface import Bucket, DeviceInfo, DeviceRuntime, KernelContext, RuntimeContext
from sglang_core.backend.tensor_tree import leaves, map_tensors
from sglang_core.backend.torch_backend import TorchBackend
from sglang_core.backend.torch_runtime import TorchRuntime


class CapturingBackend(TorchBackend):
    """Small buckets, so that all are captured in seconds."""

    name = "capturing"
    runtime: type[TorchRuntime]

    def probe(self) -> list[DeviceInfo]:
        return [DeviceInfo(backend=self.name, path=self.name, name="records and replays", score=-2)]

    def claims(self, ctx: KernelContext) -> Claims:
        return Claims(profiles=("base", "graph"))

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        return self.runtime(ctx, "cpu")


class CapturingRuntime(TorchRuntime):
    """Counts the tensors that it makes outside of replays."""

    def __init__(self, ctx: RuntimeContext, device: str) -> None:
        super().__init__(ctx, device)
        self.count = 0
        self.steps: list[CapturedStep] = []

    def num_compiles(self) -> int:
        return sum(len(step.recordings) for step in self.steps)

    def num_allocations(self) -> int | None:
        return self.count

    def buckets(self, *, max_num_tokens: int, max_num_reqs: int, max_num_pages: int) -> Sequence[Bucket]:
        sizes = [(max_num_reqs, 1), (max_num_tokens, max_num_tokens)]
        return [Bucket(num_tokens=t, num_reqs=max_num_reqs, max_extend=q, num_pages=max_num_pages) for t, q in sizes]

    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        self.steps.append(CapturedStep(self, fn, state))
        return self.steps[-1]


class CapturedStep:
    """A recording for each signature: shapes, dtypes, and values that are no tensors."""

    def __init__(self, runtime: CapturingRuntime, fn: Callable[..., Any], state: Any) -> None:
        self.runtime, self.fn, self.state = runtime, fn, state
        self.recordings: dict[tuple[str, ...], Recording] = {}

    def __call__(self, batch: Any) -> Any:
        key = self.key(batch)
        with torch.inference_mode():
            if key not in self.recordings:
                self.recordings[key] = Recording(self, batch)
            return self.recordings[key].replay(batch)

    def key(self, batch: Any) -> tuple[str, ...]:
        return tuple(
            f"{path}{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Tensor) else f"{path}{leaf!r}"
            for path, leaf in leaves(batch, "")
        )

    # What a mutant does otherwise.

    def copy_input(self, path: str, held: Tensor, given: Tensor) -> None:
        held.copy_(given)

    def hand_out(self, out: Any) -> Any:
        """A recording's results are where the next replay writes."""
        return map_tensors(out, lambda _, t: t.clone(), "")

    def state_to_record(self) -> Any:
        return self.state


class Recording:
    """The ops of one call and their tensors."""

    def __init__(self, step: CapturedStep, batch: Any) -> None:
        self.step = step
        mine = map_tensors(batch, lambda _, t: t.clone(), "")
        self.inputs = {
            path: t for path, t in leaves(mine, "") if isinstance(t, Tensor)
        }  # a step may rebind its batch's fields
        with _Recorder() as recorder:
            self.out = step.fn(step.state_to_record(), mine)
        self.ops = recorder.ops
        step.runtime.count += len(self.ops)

    def replay(self, batch: Any) -> Any:
        given = dict(leaves(batch, ""))
        for path, held in self.inputs.items():
            self.step.copy_input(path, held, given[path])
        for func, args, kwargs, results in self.ops:
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(results, again, strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)
        return self.step.hand_out(self.out)


class _Recorder(TorchDispatchMode):
    """Every op but those that only look at memory another way: a view of what lies still lies still."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = tree_leaves(out)
        if func._schema.is_mutable or not _shares(results, tree_leaves((args, kwargs))):
            self.ops.append((func, args, kwargs, results))
        return out


def _shares(results: list[Any], inputs: list[Any]) -> bool:
    places = {t.untyped_storage()._cdata for t in inputs if isinstance(t, Tensor)}
    return any(isinstance(t, Tensor) and t.untyped_storage()._cdata in places for t in results)


class DecodeCapturingRuntime(CapturingRuntime):
    """One bucket, of decode steps; prefills run in their own shapes, and are not captured."""

    takes_exact_shapes = True

    def buckets(self, *, max_num_tokens: int, max_num_reqs: int, max_num_pages: int) -> Sequence[Bucket]:
        return [Bucket(num_tokens=max_num_reqs, num_reqs=max_num_reqs, max_extend=1, num_pages=max_num_pages)]

    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        return super().compile_step(fn, state, buckets) if buckets else TorchRuntime.compile_step(self, fn, state, ())


class DecodeCapturingBackend(CapturingBackend):
    runtime = DecodeCapturingRuntime


CapturingBackend.runtime = CapturingRuntime
