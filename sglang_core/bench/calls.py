"""Which calls of an op `tune` can make: for each op, the steps that it is called in, and who makes the operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from sglang_core.backend.interface import RuntimeContext
from sglang_core.backend.selection import BoundOp, OpTable
from sglang_core.bench import row_calls
from sglang_core.bench.attention_calls import (
    absorbed_steps,
    latent,
    paged,
    paged_steps,
    prompt_steps,
    ragged,
    rope_paged,
)
from sglang_core.bench.op_calls import Maker, OpCall, Operands, Step, fused, grouped, linear, linear_gated
from sglang_core.engine.resolve import Resolved

SEED = 0


def any_step(tokens: int, context: int) -> Iterator[Step]:
    yield Step(tokens)


@dataclass(frozen=True, slots=True)
class Calls:
    """Of one op. `steps` is told how many tokens, and how many a decoding req attends to."""

    make: Maker
    steps: Callable[[int, int], Iterator[Step]] = any_step


# Ops whose kernels choose by sizes: of attention, what differs from one kernel to another and no more.
TUNED: Mapping[str, Calls] = {
    "moe.fused": Calls(fused),
    "gemm.linear": Calls(linear),
    "gemm.grouped": Calls(grouped),
    "attn.paged": Calls(paged, paged_steps),
    "attn.mla_paged": Calls(latent, paged_steps),
}
# Ops whose providers are compared: as layers call them, so that what a provider does in one launch or in three counts.
COMPARED: Mapping[str, Calls] = {
    **TUNED,
    "attn.mla_paged": Calls(partial(latent, written=True), absorbed_steps),
    "attn.rope_paged": Calls(rope_paged, paged_steps),
    "attn.ragged": Calls(ragged, prompt_steps),
    "gemm.linear_gated": Calls(linear_gated),
    "act.gated": Calls(row_calls.gated),
    "norm.rms": Calls(row_calls.norm),
    "norm.add_rms": Calls(row_calls.norm),
}


def calls_of(make: Operands, bound: BoundOp, tokens: int) -> Iterator[OpCall]:
    """What kernels are tuned with. Operands of one call are gone when the next is asked for."""
    calls = TUNED[bound.site.op]
    for step in calls.steps(tokens, make.context):
        yield build(calls, make, bound, step)


def build(calls: Calls, make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """Equal operands for equal sites, whatever was built before."""
    make.generator.manual_seed(SEED)
    return calls.make(make, bound, step)


def open_operands(resolved: Resolved, table: OpTable, context: int) -> Operands:
    """Open the device. Who asks closes the runtime."""
    runtime = resolved.device.backend.create_runtime(
        RuntimeContext(devices=(resolved.device.info,), num_threads=resolved.config.device.num_threads)
    )
    context = min(context, resolved.context_length)
    return Operands(runtime=runtime, table=table, context=context, generator=torch.Generator())
