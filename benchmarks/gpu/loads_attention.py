"""Attention: decode over a pool, long prefills, latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.load import Load, Work, size_of
from benchmarks.gpu.opened import PAGE_SIZE, Opened
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.backend.pool import PoolSpec
from sglang_core.bench.attention_calls import Reqs, batch_of, fill
from sglang_core.ops.attention import AttnSpec, RaggedBatch
from sglang_core.ops.mla import MLASpec

GQA = AttnSpec(num_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128, scale=128**-0.5)
SMALL_GQA = replace(GQA, num_heads=4, num_kv_heads=2, head_dim=16, v_head_dim=16)
MLA = MLASpec(num_heads=128, rank=512, nope_dim=128, rope_dim=64, v_head_dim=128, scale=192**-0.5)
SMALL_MLA = replace(MLA, num_heads=4, rank=32, nope_dim=16, rope_dim=16)
FEW_HEADS = 16  # up to which every provider's decode over latents is Triton's
RAGGED = [(500, 1)] * 63 + [(100_000, 1)]  # one long context among short ones
PEERS = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}


def shrunk(reqs: Reqs) -> Reqs:
    """At most four reqs of few tokens, as many new ones as before or a few."""
    return [(min(prefix, 40), min(extend, 40)) for prefix, extend in reqs[-4:]]


def pairs_of(reqs: Reqs) -> int:
    """Query and key pairs under a causal mask."""
    return sum(extend * prefix + extend * (extend + 1) // 2 for prefix, extend in reqs)


def paged(opened: Opened, *, reqs: Reqs, kv_dtype: str = "auto") -> Work:
    """All keys are in the pool. Bytes: queries, keys and values once, results."""
    spec = replace(SMALL_GQA if opened.small else GQA, kv_dtype=kv_dtype)
    reqs = shrunk(reqs) if opened.small else reqs
    shape = PoolSpec(
        num_layers=1,
        page_size=PAGE_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        dtype=KV_DTYPES.get(kv_dtype, torch.bfloat16),
    )
    widths = [(spec.num_heads, spec.head_dim)]
    long = max(extend for _, extend in reqs) > 1
    call, provider, q, compared = over_pool(opened, "attn", spec, shape, reqs, widths, asked_for=long)
    keys = sum(prefix + extend for prefix, extend in reqs)
    return Work(
        call=call,
        provider=provider,
        nbytes=keys * shape.bytes_per_token + 2 * size_of(*q),
        flops=4 * pairs_of(reqs) * spec.num_heads * spec.head_dim,
        compared=compared,
    )


def latent(opened: Opened, *, reqs: Reqs, heads: int) -> Work:
    """A score takes rank + rope_dim multiply-adds, a value rank."""
    spec = SMALL_MLA if opened.small else replace(MLA, num_heads=heads)
    reqs = shrunk(reqs) if opened.small else reqs
    shape = PoolSpec(
        kind="mla",
        num_layers=1,
        page_size=PAGE_SIZE,
        num_kv_heads=1,
        head_dim=spec.rank,
        v_head_dim=spec.rope_dim,
        dtype=torch.bfloat16,
    )
    widths = [(spec.num_heads, spec.rank), (spec.num_heads, spec.rope_dim)]
    wide = heads > FEW_HEADS
    call, provider, q, compared = over_pool(opened, "attn.mla", spec, shape, reqs, widths, asked_for=wide)
    keys = sum(prefix + extend for prefix, extend in reqs)
    return Work(
        call=call,
        provider=provider,
        nbytes=keys * shape.bytes_per_token + size_of(*q) + size_of(q[0]),
        flops=2 * pairs_of(reqs) * spec.num_heads * (2 * spec.rank + spec.rope_dim),
        compared=compared,
    )


def over_pool(
    opened: Opened,
    family: str,
    spec: Any,
    shape: PoolSpec,
    reqs: Reqs,
    widths: list[tuple[int, int]],
    *,
    asked_for: bool,
) -> tuple[partial[Any], str, list[Tensor], dict[str, partial[Any]]]:
    """The call, who runs it, and its queries; with `asked_for` also the calls of providers that have to be, on plans of their own."""
    make = opened.operands()
    names = ("attn.mla_paged", "attn.mla_plan") if family == "attn.mla" else ("attn.paged", "attn.plan")
    sites = [OpSite(op=op, layer="Benchmark", dtype="bfloat16", spec=spec) for op in names]
    bound = make.table.bind_group(sites)
    batch = batch_of(reqs, PAGE_SIZE, make.generator)
    shape = replace(shape, layout=make.table.pool_layout())
    pool = opened.runtime.alloc_pool(shape, batch.num_reqs * batch.num_pages + 1)
    fill(make, pool)
    plan = bound[names[1]].fn(spec, batch, opened.device)
    q = [make.normal(batch.num_tokens, *width, dtype=torch.bfloat16) for width in widths]
    args = (*q, None, None, pool, 0, spec)
    kernels, plans = (opened.asked_for(op, spec=spec) if asked_for else {} for op in names)
    compared = {name: partial(op.fn, *args, plans[name].fn(spec, batch, opened.device)) for name, op in kernels.items()}
    return partial(bound[names[0]].fn, *args, plan), bound[names[0]].provider, q, compared


def prefill(opened: Opened, *, tokens: int) -> Work:
    """One prompt, packed, causal; torch's own kernels on the same numbers beside it, and those of sglang-triton for one architecture alone."""
    spec, tokens = (SMALL_GQA, 48) if opened.small else (GQA, tokens)
    make = opened.operands()
    bound = opened.bind(make, "attn.ragged", spec=spec)
    q = make.normal(tokens, spec.num_heads, spec.head_dim, dtype=torch.bfloat16)
    k, v = (make.normal(tokens, spec.num_kv_heads, spec.head_dim, dtype=torch.bfloat16) for _ in range(2))
    batch = RaggedBatch.of([tokens], [tokens], opened.device)
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [1, H, T, D]

    def peer(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

    def call(fn: Callable[..., Any]) -> Callable[[], Tensor]:
        return partial(fn, q, k, v, batch, spec)

    return Work(
        call=call(bound.fn),
        provider=bound.provider,
        nbytes=2 * size_of(q, k),
        flops=4 * pairs_of([(0, tokens)]) * spec.num_heads * spec.head_dim,
        others={name: partial(peer, backend) for name, backend in PEERS.items()} if opened.on_gpu else {},
        compared={name: call(op.fn) for name, op in opened.asked_for("attn.ragged", spec=spec).items()},
    )


def decode(batch: int, context: int) -> Reqs:
    return [(context - 1, 1)] * batch


LOADS = [
    Load(name="decode GQA 32/8 D128, batch 64, context 4k", make=partial(paged, reqs=decode(64, 4096)), target=0.85, rank=0),
    Load(name="prefill GQA 32/8 D128, 16k tokens", make=partial(prefill, tokens=16_384), target=0.75, rank=1, seconds=30),
    Load(name="MLA decode 128 heads, batch 64, context 4k", make=partial(latent, reqs=decode(64, 4096), heads=128), target=0.8, rank=2),
    Load(name="MLA decode 16 heads, batch 64, context 4k", make=partial(latent, reqs=decode(64, 4096), heads=16), target=0.8, rank=20),
    Load(name="prefill paged, 16k tokens", make=partial(paged, reqs=[(0, 16_384)]), target=0.75, rank=21, seconds=30),
    Load(name="decode, fp8 pool, batch 64, context 4k", make=partial(paged, reqs=decode(64, 4096), kv_dtype="fp8_e4m3"), target=0, rank=22),
    Load(name="decode, batch 1, context 4k", make=partial(paged, reqs=decode(1, 4096)), target=0, rank=23),
    Load(name="decode, 63 of 500 and one of 100k", make=partial(paged, reqs=RAGGED), target=0, rank=24),
]  # fmt: skip
