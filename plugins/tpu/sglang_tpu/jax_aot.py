"""jax's kernels at sizes of ours, for `sglang_tpu.aot`: the same heads, tokens, pages and reqs, beside each other in the budget file."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sglang_core.api.ops import AttnSpec
from sglang_tpu import jax_experts
from sglang_tpu.aot import AotSpec
from sglang_tpu.aot_matmul import EXPERT_TOKENS, EXPERTS, experts
from sglang_tpu.attention_aot import LLAMA, NUM_PAGES, heads_of
from sglang_tpu.jax_attention import Facts, step
from sglang_tpu.pools import whole_lanes


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return _array(*shape, dtype=jnp.int32)


def _attention(
    case: str, spec: AttnSpec, tokens: int, page_size: int = 64, reqs: int = 64, columns: int = 256
) -> AotSpec:
    """`reqs` x `columns` are in SMEM, whole: 1 MiB is all of it."""
    dims = (spec.num_kv_heads, spec.head_dim)
    leaf = _array(NUM_PAGES, page_size, 2 * spec.num_kv_heads, whole_lanes(spec.head_dim))
    plan = (_ints(reqs + 1), _ints(reqs), _ints(reqs, columns), _ints(1), _ints(tokens))
    return AotSpec(
        op="attn.paged by jax",
        case=case,
        fn=partial(step, Facts(spec.scale, spec.soft_cap, spec.v_head_dim)),
        args=(_array(tokens, spec.num_heads, spec.head_dim), (_array(tokens, *dims),) * 2, leaf, plan, _ints(tokens)),
        uncopied=2,
        donated=True,
    )


AOT = (
    *(_attention(f"32 of 8 heads, decode of 64, page of {n}", LLAMA, 64, n) for n in (16, 32, 64, 128)),
    _attention("32 of 8 heads, prefill of 2048", LLAMA, 2048),
    _attention("32 of 8 heads, prefill of 8192", LLAMA, 8192),
    _attention("8 of 2 heads, decode of 64", heads_of(8, 2), 64),
    _attention("64 of 64 heads, prefill of 2048", heads_of(64, 64), 2048),
    _attention("4 of 1 heads, decode of 64", heads_of(4, 1), 64),
    _attention("4 of 1 heads, prefill of 2048", heads_of(4, 1), 2048),
    _attention("soft cap, prefill of 2048", heads_of(32, 8, soft_cap=50.0), 2048),
    _attention("D=64, decode of 64", heads_of(64, 8, 64), 64),
    *(
        experts("dense", name, tokens, op="moe.fused by jax", fused=jax_experts.fused)
        for name in EXPERTS
        for tokens in (*EXPERT_TOKENS, 4096)
    ),
)
