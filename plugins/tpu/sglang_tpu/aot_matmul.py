"""Products at production sizes, to be compiled ahead of time: (title, function, abstract arguments).

Linear layers are Llama-3.1-8B's, experts Qwen3-30B-A3B's and DeepSeek-V3's (of 8 and of 32 ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch

from sglang_core.api.ops import OPS, ExpertSpec, PackedWeight
from sglang_tpu import gemm, moe
from sglang_tpu.environment import OF_JAX, array, environment, wrap
from sglang_tpu.weights import pack

Case = tuple[str, Callable[..., Any], tuple[Any, ...]]

LINEARS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # out, in
LINEAR_FORMATS = {
    "int8.token_channel": (1, 16, 128, 512),
    "fp8.token_channel": (16, 512),
    "fp8.block128": (16, 512),
    "int4.awq.g128": (1, 16, 128, 512),
    "int4.pack.g128": (16, 512),
    "int4.gptq.g32": (16,),
    "int8.token_channel.asym": (16,),
    "w4a8_fp8.g128": (16,),
    "mxfp4.g32": (16, 512),
    "nvfp4.g16": (16, 512),
}
EXPERTS = {  # hidden size, width, experts held, experts in all, experts a token
    "qwen3-30b-a3b": (2048, 768, 128, 128, 8),
    "deepseek-v3.ep32": (7168, 2048, 8, 256, 8),
}
EXPERT_FORMATS = {
    "qwen3-30b-a3b": ("dense", "int8.token_channel", "int4.awq.g128", "fp8.block128"),
    "deepseek-v3.ep32": ("dense", "fp8.block128", "int8.token_channel"),
}
EXPERT_TOKENS = (1, 16, 128, 512)


def cases() -> Iterator[Case]:
    for fmt, tokens in LINEAR_FORMATS.items():
        for name, (rows, columns) in LINEARS.items():
            for num in tokens:
                yield linear_case(f"gemm.linear[{fmt}, {name}, {num} tokens]", fmt, rows, columns, num)
    for model, sizes in EXPERTS.items():
        for fmt in EXPERT_FORMATS[model]:
            for num in EXPERT_TOKENS:
                yield experts_case(f"moe.fused[{fmt}, {model}, {num} tokens]", fmt, *sizes, num)


def linear_case(title: str, fmt: str, rows: int, columns: int, num_tokens: int) -> Case:
    shapes = packed_shapes(fmt, rows, columns)

    def run(x: jax.Array, tensors: dict[str, jax.Array]) -> jax.Array:
        w = _weight(fmt, tensors, rows, columns)
        with environment():
            return array(gemm.linear(wrap(x), w))

    return title, run, (jax.ShapeDtypeStruct((num_tokens, columns), jnp.bfloat16), shapes)


def experts_case(
    title: str, fmt: str, hidden: int, width: int, held: int, num_experts: int, k: int, num_tokens: int
) -> Case:
    shape13, shape2 = (2 * width, hidden), (hidden, width)
    shapes = [packed_shapes(fmt, *shape, held) for shape in (shape13, shape2)]

    def run(
        x: jax.Array,
        tensors: list[dict[str, jax.Array]],
        weights: jax.Array,
        ids: jax.Array,
        expert_map: jax.Array,
    ) -> jax.Array:
        w13, w2 = (_weight(fmt, t, *shape, held) for t, shape in zip(tensors, (shape13, shape2), strict=True))
        given = [wrap(each) for each in (x, weights, ids, expert_map)]
        with environment():
            return array(
                moe.fused(given[0], w13, w2, given[1], given[2], ExpertSpec(activation="silu"), expert_map=given[3])
            )

    routed = (num_tokens, k)
    args = (
        jax.ShapeDtypeStruct((num_tokens, hidden), jnp.bfloat16),
        shapes,
        jax.ShapeDtypeStruct(routed, jnp.float32),
        jax.ShapeDtypeStruct(routed, jnp.int32),
        jax.ShapeDtypeStruct((num_experts,), jnp.int32),
    )
    return title, run, args


def packed_shapes(fmt: str, rows: int, columns: int, num_experts: int | None = None) -> dict[str, Any]:
    """The tensors that a kernel reads of such a weight."""
    lead = () if num_experts is None else (num_experts,)
    if fmt == "dense":
        return {"weight": jax.ShapeDtypeStruct((*lead, rows, columns), jnp.bfloat16)}
    with torch.device("meta"):
        one = pack(OPS["quant.quantize"].body(torch.empty(rows, columns), fmt))
    return {name: jax.ShapeDtypeStruct((*lead, *t.shape), _dtype(t.dtype)) for name, t in one.named_buffers()}


def _dtype(dtype: torch.dtype) -> Any:
    known = {ours: theirs for theirs, (_, ours) in OF_JAX.items()}
    return known.get(dtype) or jnp.dtype(str(dtype).removeprefix("torch."))


def _weight(
    fmt: str, tensors: dict[str, jax.Array], rows: int, columns: int, num_experts: int | None = None
) -> PackedWeight:
    return PackedWeight(
        fmt,
        {name: wrap(t) for name, t in tensors.items()},
        out_features=rows,
        in_features=columns,
        num_experts=num_experts,
        layout="canonical" if fmt == "dense" else "tpu.tiles",
    )
