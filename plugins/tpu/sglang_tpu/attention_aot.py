"""The attention kernel at production sizes, for `sglang_tpu.aot`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sglang_core.api.ops import AttnSpec, MLASpec
from sglang_tpu.aot import AotSpec
from sglang_tpu.attention import facts_of, step, write_step
from sglang_tpu.attention_plan import FIELDS, block_tokens
from sglang_tpu.pools import whole_lanes

NUM_PAGES, COLUMNS, REQS = 1536, 2048, 256  # a pool of some pages; reqs of up to 131072 tokens at 64 a page


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return _array(*shape, dtype=jnp.int32)


def _spec(case: str, spec: AttnSpec | MLASpec, tokens: int, max_extend: int, page_size: int = 64) -> AotSpec:
    latent = isinstance(spec, MLASpec)
    attn = spec.latent if isinstance(spec, MLASpec) else spec
    widths = (spec.rank, spec.rope_dim) if isinstance(spec, MLASpec) else (spec.head_dim, spec.v_head_dim)
    block = block_tokens(attn, max_extend)
    items = tokens if block == 1 else -(-tokens // block) + REQS
    facts = facts_of(attn, block, latent=latent, lse=False)
    queries = tuple(_array(tokens, attn.num_heads, width) for width in widths[: 2 if latent else 1])
    new = tuple(_array(tokens, attn.num_kv_heads, width) for width in widths)
    leaves = tuple(_array(NUM_PAGES, page_size, attn.num_kv_heads, whole_lanes(width)) for width in widths)
    plan = (_ints(items * len(FIELDS)), _ints(1), _ints(REQS, COLUMNS), _ints(tokens), _ints(tokens))
    sinks = _array(attn.num_heads, dtype=jnp.float32) if attn.has_sinks else None
    return AotSpec(
        op="attn.mla_paged" if latent else "attn.paged",
        case=case,
        fn=partial(step, facts),
        args=(queries, new, leaves, plan, sinks),
        uncopied=2,
        donated=True,
    )


def _write(case: str, heads: int, tokens: int) -> AotSpec:
    leaves = (_array(NUM_PAGES, 64, heads, 128),) * 2
    return AotSpec(
        op="kv.write",
        case=case,
        fn=write_step,
        args=((_array(tokens, heads, 128),) * 2, leaves, _ints(tokens)),
        uncopied=1,
        donated=True,
    )


def heads_of(heads: int, kv_heads: int, dim: int = 128, **more: Any) -> AttnSpec:
    return AttnSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=dim, scale=dim**-0.5, **more)


LLAMA = heads_of(32, 8)  # Llama-3.1-8B
GEMMA = heads_of(8, 4, 256, window=4096, soft_cap=50.0)  # Gemma-2-2B
GPT_OSS = heads_of(64, 8, 64, window=128, has_sinks=True)


def _deepseek(heads: int) -> MLASpec:
    """DeepSeek-V3, or a rank's part of it."""
    return MLASpec(num_heads=heads, rank=512, nope_dim=128, rope_dim=64, v_head_dim=128, scale=192**-0.5)


AOT = (
    *(_spec(f"32 of 8 heads, decode of 64, page of {n}", LLAMA, 64, 1, n) for n in (16, 32, 64, 128)),
    _spec("32 of 8 heads, prefill of 2048", LLAMA, 2048, 2048),
    _spec("32 of 8 heads, prefill of 8192", LLAMA, 8192, 8192),
    _spec("32 of 8 heads, verification of 64 x 8", LLAMA, 512, 8),
    _spec("8 of 2 heads, decode of 64", heads_of(8, 2), 64, 1),
    _spec("64 of 64 heads, prefill of 2048", heads_of(64, 64), 2048, 2048),
    _spec("4 of 1 heads, decode of 64", heads_of(4, 1), 64, 1),
    _spec("4 of 1 heads, prefill of 2048", heads_of(4, 1), 2048, 2048),
    _spec("D=256, window and soft cap, decode of 64", GEMMA, 64, 1),
    _spec("D=256, window and soft cap, prefill of 2048", GEMMA, 2048, 2048),
    _spec("D=64, window and sinks, decode of 64", GPT_OSS, 64, 1),
    _spec("D=64, window and sinks, prefill of 2048", GPT_OSS, 2048, 2048),
    _spec("128 heads, decode of 64", _deepseek(128), 64, 1),
    _spec("16 heads, decode of 64", _deepseek(16), 64, 1),
    _spec("16 heads, prefill of 2048", _deepseek(16), 2048, 2048),
    _spec("128 heads, prefill of 512", _deepseek(128), 512, 512),
    _write("8 heads, T=64", 8, 64),
    _write("8 heads, T=2048", 8, 2048),
)
