"""Attention over latents for Blackwell, by the kernel of `blackwell_latent_kernels`. Of the provider `blackwell`, which is taken where it is asked for."""

from __future__ import annotations

from functools import partial

from sglang_triton import blackwell_attention
from sglang_triton.blackwell_latent_kernels import CHUNK, HALF, HALVES, KEYS, ROPE, ROWS, _attend_latents_blackwell
from sglang_triton.gluon_latents import Form, form_specs, paged

FORM = Form(
    arch=blackwell_attention.FORM.arch,
    name=blackwell_attention.FORM.name,
    rows=ROWS.value,
    shares=HALVES.value,
    keys=KEYS.value,
    latents={"own_desc": HALF.value, "rest_desc": CHUNK.value},
    rope=ROPE.value,
    instructions=blackwell_attention.FORM.instructions,
)
mla_paged = partial(paged, _attend_latents_blackwell, FORM)
AOT = form_specs(_attend_latents_blackwell, FORM)
