"""Backends with one mistake each that an engine shows: what is computed depends on chunks, neighbours, pages or order; or stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.claims import Claims
from sglang_core.backend.interface import Bucket, DeviceInfo, DeviceRuntime, KernelContext, RuntimeContext
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.pool import Pool
from sglang_core.backend.torch_backend import TorchBackend
from sglang_core.backend.torch_runtime import TorchRuntime
from sglang_core.ops import OPS
from sglang_core.ops.attention import AttnBatch, AttnSpec, Plan, RaggedBatch
from sglang_core.ops.weight import PackedWeight

INFO = DeviceInfo(backend="mutant", path="mutant", name="one mistake")


class EngineMutant(TorchBackend):
    """Kernels by op (functions of this module or another), and a runtime."""

    name = "mutant"

    def __init__(
        self, kernels: Sequence[Kernel] = (), runtime: type[TorchRuntime] = TorchRuntime, claims: Claims | None = None
    ) -> None:
        self._kernels, self._runtime, self._claims = list(kernels), runtime, claims or Claims()

    def probe(self) -> list[DeviceInfo]:
        return [INFO]

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        return self._kernels

    def claims(self, ctx: KernelContext) -> Claims:
        return self._claims

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        return self._runtime(ctx)


def body(op: str, *args: Any, **kwargs: Any) -> Any:
    return OPS[op].body(*args, **kwargs)


def attend(q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, **kw: Any) -> Any:
    """Honest."""
    return body("attn.paged", q, k, v, pool, layer, spec, plan, **kw)


def forgets_the_prefix_in_chunks(
    q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, **kw: Any
) -> Any:
    """Several new tokens attend to each other, and to nothing before them."""
    out = attend(q, k, v, pool, layer, spec, plan, **kw)
    cu = plan.cu_extend.tolist()
    for r in range(plan.static.num_reqs):
        rows, extend = slice(cu[r], cu[r + 1]), cu[r + 1] - cu[r]
        if extend > 1 and int(plan.prefix_lens[r]) > 0:
            alone = RaggedBatch.of([extend], [extend], q.device)
            out[rows] = body("attn.ragged", q[rows], k[rows], v[rows], alone, spec)
    return out


class Planned:
    """A kernel of attn.plan that changes the batch before it plans, where `when` holds."""

    def __init__(self, when: Callable[[AttnBatch], bool], change: Callable[[AttnBatch], AttnBatch]) -> None:
        self._when, self._change = when, change

    def __call__(self, spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Any = None) -> Plan:
        batch = self._change(batch) if self._when(batch) else batch
        return body("attn.plan", spec, batch, device, out)  # type: ignore[no-any-return]


def without_the_last_key(batch: AttnBatch) -> AttnBatch:
    """Of the last req."""
    lens, prefixes = batch.seq_lens_cpu.clone(), batch.prefix_lens_cpu.clone()
    lens[batch.num_reqs - 1] -= 1
    prefixes[batch.num_reqs - 1] -= 1
    return replace(batch, seq_lens_cpu=lens, prefix_lens_cpu=prefixes)


def without_the_last_page(batch: AttnBatch) -> AttnBatch:
    """A prefix of whole pages ends with the page before its last: what it held is another's."""
    table = batch.page_table_cpu.clone()
    for r in range(batch.num_reqs):
        prefix = int(batch.prefix_lens_cpu[r])
        if prefix >= 2 * batch.page_size and prefix % batch.page_size == 0:
            last = prefix // batch.page_size - 1
            table[r, last] = table[r, last - 1]
    return replace(batch, page_table_cpu=table)


def in_three_bits(batch: AttnBatch) -> AttnBatch:
    size = batch.page_size
    slots = batch.slot_mapping_cpu
    return replace(
        batch, page_table_cpu=batch.page_table_cpu % 8, slot_mapping_cpu=slots // size % 8 * size + slots % size
    )


def decodes(batch: AttnBatch) -> bool:
    return batch.max_extend == 1


forgets_the_newest_key_in_decode = Planned(decodes, without_the_last_key)
forgets_the_last_of_a_batch = Planned(lambda batch: decodes(batch) and batch.num_reqs > 1, without_the_last_key)
prefix_is_one_page_short = Planned(lambda batch: batch.max_extend > 1, without_the_last_page)
page_ids_in_three_bits = Planned(lambda batch: True, in_three_bits)


class KeepsPages:
    """Keys and values of a page as they were when it was full first, whoever has it now."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, **kw: Any) -> Any:
        if k is not None:
            pool.scatter(layer, plan.slot_mapping, k, v)
        size = plan.static.page_size
        for r in range(plan.static.num_reqs):
            for page in plan.page_table[r, : int(plan.seq_lens[r]) // size].tolist():
                slots = torch.arange(page * size, (page + 1) * size, dtype=torch.int32)
                key = (id(pool), layer, page)
                if key not in self._kept:
                    self._kept[key] = tuple(part.clone() for part in pool.gather(layer, slots))  # type: ignore[assignment]
                pool.scatter(layer, slots, *self._kept[key])
        return attend(q, None, None, pool, layer, spec, plan, **kw)


keeps_pages = KeepsPages()


def one_scale_for_the_batch(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Activations in 12 bits, with the scale of the largest of all rows."""
    scale = x.abs().amax() / 2047 if x.numel() else 1.0
    return body("gemm.linear", (x / scale).round() * scale, w, bias)  # type: ignore[no-any-return]


KEPT: list[Tensor] = []


def keeps_its_inputs(x: Tensor, kind: str) -> Tensor:
    KEPT.append(x)
    return body("act.gated", x, kind)  # type: ignore[no-any-return]


class _Waiting(Future[Any]):
    """Runs what was submitted after it first."""

    def __init__(self, stream: NewestFirst) -> None:
        super().__init__()
        self._stream = stream

    def result(self, timeout: float | None = None) -> Any:
        while not self.done():
            self._stream.run_one()
        return super().result(timeout)


class NewestFirst:
    """A stream that keeps no order."""

    def __init__(self) -> None:
        self._work: list[tuple[_Waiting, Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        done = _Waiting(self)
        self._work.append((done, fn, args))
        return done

    def run_one(self) -> None:
        done, fn, args = self._work.pop()
        done.set_result(fn(*args))

    def close(self) -> None:
        self._work.clear()


class OutOfOrder(TorchRuntime):
    def stream(self) -> Any:
        return NewestFirst()


class Replays(TorchRuntime):
    """A step of known shapes runs on the plans that it had the first time, as a graph whose inputs are not renewed."""

    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        captured: dict[tuple[int, int], Any] = {}
        step = super().compile_step(fn, state, buckets)

        def replay(forward_batch: Any) -> Any:
            if hasattr(forward_batch, "plans"):
                rows = forward_batch.sample_rows
                shape = (len(forward_batch.positions), None if rows is None else len(rows))
                forward_batch.plans = captured.setdefault(shape, forward_batch.plans)
            return step(forward_batch)

        return replay
