"""Steps compiled for TPUs that are not here, through the code that serves: the same runner, model, kernels and `Program`.

The runtime of this file stands in for a device's. Its tensors are on PyTorch's meta device, so that nothing of a model of any size is
allocated; a step that it is given is lowered for a topology and compiled by libtpu, and what the compiler says is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jax.sharding import Mesh

from sglang_core.api import (
    Bucket,
    Communicator,
    DeviceInfo,
    DeviceRuntime,
    MemoryInfo,
    MeshContext,
    Pool,
    PoolSpec,
    RuntimeContext,
    StatePool,
    StatePoolSpec,
    TorchRuntime,
)
from sglang_tpu.backend import TpuBackend
from sglang_tpu.chips import Chip
from sglang_tpu.environment import lift
from sglang_tpu.hlo import Module
from sglang_tpu.mesh import MeshCommunicator, spread_shape
from sglang_tpu.pools import TpuStatePool, pool_of
from sglang_tpu.runtime import TpuRuntime
from sglang_tpu.step import Program, lift_state, lift_weights

M = TypeVar("M")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledStep:
    """What one device holds and moves in a compiled step, in bytes of HBM unless said otherwise, as the compiler laid it out."""

    name: str  # of the step function
    arguments: int  # weights, pools and inputs
    results: int  # without those that are arguments, changed where they are
    temporary: int
    code: int
    vmem: int  # the most that an instruction finds in vector memory: what is kept there, and its own
    traffic: int  # read and written in one run
    num_state: int  # tensors that the step may change ...
    num_aliased: int  # ... and how many of them it changes where they are
    host_transfers: tuple[str, ...]  # instructions in it that wait for the host

    @property
    def held(self) -> int:
        return self.arguments + self.results + self.temporary + self.code


class AotRuntime(TpuRuntime):
    """A mesh that is not here, traced as its rank 0. `compiled` has a row for each step that was compiled for it."""

    def __init__(self, ctx: RuntimeContext, chip: Chip, mesh: Mesh, buckets: Sequence[Bucket]) -> None:
        TorchRuntime.__init__(self, ctx, "meta")
        self.chip, self._mesh, self._buckets = chip, mesh, buckets
        self.compiled: list[CompiledStep] = []

    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=self.chip.hbm_bytes, free=self.chip.hbm_bytes)

    def buckets(self, *, max_num_tokens: int, max_num_reqs: int, max_num_pages: int) -> Sequence[Bucket]:
        return self._buckets

    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        """A step that is compiled each time it is called, and gives shapes. Where the mesh is one of several, each has as much as rank 0."""
        weights = [spread_shape(x, self._mesh) for x in lift_weights(fn)]
        lift_state(state)

        def step(batch: Any) -> Any:
            lowered, result = Program(fn, state, batch, weights, self._mesh).lower(batch, self._mesh)
            self.compiled.append(self._examine(fn.__name__, lowered.compile(), len(list(state.mutable_tensors()))))
            return result

        return step

    def _examine(self, name: str, program: Any, num_state: int) -> CompiledStep:
        memory, module = program.memory_analysis(), Module(program.as_text())
        return CompiledStep(
            name=name.strip("_"),
            arguments=memory.argument_size_in_bytes,
            results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            vmem=module.vmem(),
            traffic=sum(module.traffic().values()),
            num_state=num_state,
            num_aliased=module.num_aliased(),
            host_transfers=tuple(module.host_transfers()),
        )

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        return pool_of(spec, num_pages, self._make)

    def alloc_state_pool(self, spec: StatePoolSpec, num_slots: int) -> StatePool:
        self._refuse_layout(spec.layout, StatePool.layout)
        return TpuStatePool(spec, num_slots, self._make)

    def _make(self, shape: Sequence[int], dtype: torch.dtype) -> Any:
        """A rank's part of a pool, in shape only."""
        return spread_shape(lift(torch.empty(tuple(shape), dtype=dtype, device="meta")), self._mesh)

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        return MeshCommunicator(rank, len(ranks))

    def join_ranks(self, models: Iterator[M]) -> M:
        """Rank 0's: the others' tensors have its shapes."""
        return next(models)


class AotBackend(TpuBackend):
    """sglang-tpu on a chip that is not here. An engine is given it as its device; `runtime` is what was made of it."""

    def __init__(self, chip: Chip, mesh: Mesh, buckets: Sequence[Bucket]) -> None:
        self.chip, self._mesh, self._buckets = chip, mesh, buckets
        self.runtime: AotRuntime | None = None

    def probe(self) -> list[DeviceInfo]:
        path, name = f"tpu/{self.chip.name}", self.chip.kind
        return [DeviceInfo(backend=self.name, path=path, name=name, total_memory=self.chip.hbm_bytes)]

    def shared_by_ranks(self, info: DeviceInfo) -> bool:
        return True  # none of them is there

    def mesh(self, ctx: MeshContext) -> tuple[DeviceInfo, ...]:
        return tuple(self.probe()) * ctx.num_ranks

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        self.runtime = AotRuntime(ctx, self.chip, self._mesh, self._buckets)
        return self.runtime
