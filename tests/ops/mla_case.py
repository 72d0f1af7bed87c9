"""Batches over a poisoned pool of latents, and latent attention written the plainest way, in float64, to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_core.backend.pool import Pool
from sglang_core.ops.attention import AttnBatch
from sglang_core.ops.mla import MLASpec
from tests.ops.paged_case import CPU, attn_spec, naive_attention, paged_case

SPEC = MLASpec(num_heads=4, rank=12, nope_dim=6, rope_dim=4, v_head_dim=8, scale=0.5)


@dataclass(kw_only=True)
class MLACase:
    """One step: its new tokens in q_nope, q_pe, c_kv, k_pe; the latents of whole reqs in `latents` and `rotated`."""

    spec: MLASpec
    batch: AttnBatch
    pool: Pool
    q_nope: Tensor
    q_pe: Tensor
    c_kv: Tensor
    k_pe: Tensor
    latents: list[Tensor]
    rotated: list[Tensor]


def mla_case(reqs: Sequence[tuple[int, int]], *, spec: MLASpec = SPEC, seed: int = 0, **more: object) -> MLACase:
    """reqs: (prefix, extend) each. As `paged_case`, whose K and V are the latents and the rotated keys here."""
    like = attn_spec(1, 1, spec.rank, spec.rope_dim)
    case = paged_case(reqs, spec=like, seed=seed, **more)  # type: ignore[arg-type]
    pool = Pool(replace(case.pool.spec, kind="mla"), case.pool.num_pages, CPU)
    pool.leaves, pool.scales = case.pool.leaves, case.pool.scales
    g, tokens = torch.Generator().manual_seed(seed + 1), case.batch.num_tokens
    q = torch.randn(tokens, spec.num_heads, spec.rank + spec.rope_dim, generator=g).to(case.q.dtype)
    return MLACase(
        spec=spec,
        batch=case.batch,
        pool=pool,
        q_nope=q[..., : spec.rank],
        q_pe=q[..., spec.rank :],
        c_kv=case.k[:, 0],
        k_pe=case.v[:, 0],
        latents=[k[:, 0] for k in case.keys],
        rotated=[v[:, 0] for v in case.values],
    )


def naive_mla(case: MLACase) -> tuple[Tensor, Tensor]:
    """o: float64[T, Hq, rank], lse: float64[T, Hq]; padding tokens are zeros and -inf."""
    b, spec = case.batch, case.spec
    o = torch.zeros(b.num_tokens, spec.num_heads, spec.rank, dtype=torch.float64)
    lse = torch.full((b.num_tokens, spec.num_heads), -math.inf, dtype=torch.float64)
    cu = b.cu_extend_cpu.tolist()
    for r, (latents, rotated) in enumerate(zip(case.latents, case.rotated, strict=True)):
        rows = slice(cu[r], cu[r + 1])
        q = torch.cat([case.q_nope[rows], case.q_pe[rows]], -1)
        keys = torch.cat([latents, rotated], -1)[:, None]
        o[rows], lse[rows] = naive_attention(q, keys, latents[:, None], spec.latent)
    return o, lse
