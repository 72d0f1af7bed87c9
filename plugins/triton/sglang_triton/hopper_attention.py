"""Attention for Hopper, by the kernels of `hopper_kernels`. The provider `hopper`, which is taken where it is asked for."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, RaggedBatch
from sglang_triton import attention
from sglang_triton.attention_plan import WorkPlan
from sglang_triton.gluon_attention import Form, attend_items, attend_packed, form_specs
from sglang_triton.hopper_kernels import GROUPS, ROWS, _attend_items_hopper, _attend_packed_hopper

FORM = Form(
    arch="sm_90",
    name="hopper",
    rows=GROUPS.value * ROWS.value,
    keys=lambda spec: 128,  # queries and blocks of 192 and 128 dims take 213 of 227 KiB
    instructions=("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait"),
)


def paged(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    pool: Pool,
    layer: int,
    spec: AttnSpec,
    plan: WorkPlan,
    *,
    sinks: Tensor | None = None,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]). Writes k and v first. Short extends are Triton's."""
    wide = partial(attend_items, _attend_items_hopper, FORM)
    return attention.paged(q, k, v, pool, layer, spec, plan, sinks=sinks, lse=lse, wide=wide)


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    spec: AttnSpec,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv] -> o: [T, Hq, Dv] (, lse: float32[T, Hq])."""
    launch = partial(attend_packed, _attend_packed_hopper, FORM)
    return attention.ragged(q, k, v, batch, spec, lse=lse, launch=launch)


AOT = form_specs(_attend_packed_hopper, _attend_items_hopper, FORM)
