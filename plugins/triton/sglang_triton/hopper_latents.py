"""Attention over latents for Hopper, by the kernel of `hopper_latent_kernels`. Of the provider `hopper`, which is taken where it is asked for."""

from __future__ import annotations

from functools import partial

from sglang_triton import hopper_attention
from sglang_triton.gluon_latents import Form, form_specs, paged
from sglang_triton.hopper_kernels import ROWS
from sglang_triton.hopper_latent_kernels import HALF, KEYS, ROPE, _attend_latents_hopper

FORM = Form(
    arch=hopper_attention.FORM.arch,
    name=hopper_attention.FORM.name,
    rows=ROWS.value,
    keys=KEYS.value,
    latents={"c_desc": HALF.value},
    rope=ROPE.value,
    instructions=hopper_attention.FORM.instructions,
)
mla_paged = partial(paged, _attend_latents_hopper, FORM)
AOT = form_specs(_attend_latents_hopper, FORM)
