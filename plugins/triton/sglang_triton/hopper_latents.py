"""Attention over latents for Hopper, by the kernel of `hopper_latent_kernels`. Of the provider `hopper`, which is taken where it is asked for."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import MLASpec
from sglang_triton import attention, hopper_attention
from sglang_triton.attention_plan import WorkPlan
from sglang_triton.gluon_latents import Form, attend_items, form_specs
from sglang_triton.hopper_kernels import ROWS
from sglang_triton.hopper_latent_kernels import HALF, KEYS, ROPE, _attend_latents_hopper
from sglang_triton.rows import as_heads

FORM = Form(
    arch=hopper_attention.FORM.arch,
    name=hopper_attention.FORM.name,
    rows=ROWS.value,
    keys=KEYS.value,
    latents={"c_desc": HALF.value},
    rope=ROPE.value,
    instructions=hopper_attention.FORM.instructions,
)


def mla_paged(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor | None,
    k_pe: Tensor | None,
    pool: Pool,
    layer: int,
    spec: MLASpec,
    plan: WorkPlan,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q_nope: [T, Hq, rank], q_pe: [T, Hq, rope_dim] -> o: [T, Hq, rank] (, lse: float32[T, Hq]). Writes c_kv, k_pe first.

    Tiles of 16 rows, of few heads and few tokens, are Triton's.
    """
    wide = partial(attend_items, _attend_latents_hopper, FORM, as_heads(q_pe))
    return attention.mla_paged(q_nope, q_pe, c_kv, k_pe, pool, layer, spec, plan, lse=lse, wide=wide)


AOT = form_specs(_attend_latents_hopper, FORM)
