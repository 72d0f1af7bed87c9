"""Products at production sizes, for `sglang_tpu.aot`.

Linear layers are the widest and the deepest of Llama-3.1-8B, experts those of Qwen3-30B-A3B and DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from sglang_core.api.ops import OPS, ExpertSpec, PackedWeight
from sglang_tpu import gemm, moe
from sglang_tpu.aot import AotSpec
from sglang_tpu.chips import CHIPS
from sglang_tpu.environment import OF_JAX, array, environment, wrap
from sglang_tpu.weights import pack

FOR_ALL, ONE = 512, ("v6e",)  # tokens of what is compiled for all chips; the chip of everything else
LINEARS = {"gate_up": (28672, 4096), "down": (4096, 14336)}  # out, in
LINEAR_TOKENS = (("gate_up", 16), ("down", 512))
LINEAR_FORMATS = (
    *("int8.token_channel", "int8.token_channel.asym", "fp8.token_channel", "fp8.block128"),
    *("int4.awq.g128", "int4.pack.g128", "int4.gptq.g32", "w4a8_fp8.g128", "mxfp4.g32", "nvfp4.g16"),
)
LONG_FORMATS = ("int8.token_channel", "fp8.token_channel", "fp8.block128", "int4.awq.g128", "mxfp4.g32")


class Model(NamedTuple):
    """A layer of experts, or what one rank has of it."""

    hidden: int
    width: int
    held: int
    num_experts: int
    top_k: int


EXPERTS = {
    "qwen3-30b-a3b": Model(2048, 768, 128, 128, 8),
    "qwen3-30b-a3b, width of 4 ranks": Model(2048, 192, 128, 128, 8),  # rows of no whole lanes
    "deepseek-v3, experts of 32 ranks": Model(7168, 2048, 8, 256, 8),
}
EXPERT_TOKENS = (16, 512)  # a decode step, and a chunk of a prompt
EXPERT_FORMATS = {
    "qwen3-30b-a3b": ("dense", "int8.token_channel", "int4.awq.g128", "fp8.block128"),
    "qwen3-30b-a3b, width of 4 ranks": ("dense",),
    "deepseek-v3, experts of 32 ranks": ("dense", "fp8.block128", "int8.token_channel"),
}


def _linear(fmt: str, name: str, num_tokens: int) -> AotSpec:
    rows, columns = LINEARS[name]

    def run(x: jax.Array, tensors: dict[str, jax.Array]) -> jax.Array:
        w = _weight(fmt, tensors, rows, columns)
        with environment():
            return array(gemm.linear(wrap(x), w))

    args = (jax.ShapeDtypeStruct((num_tokens, columns), jnp.bfloat16), packed_shapes(fmt, rows, columns))
    case = f"{fmt}, {name}, {num_tokens} tokens"
    return AotSpec(op="gemm.linear", case=case, fn=run, args=args, uncopied=1, chips=_chips(num_tokens))


def experts(
    fmt: str, name: str, num_tokens: int, *, op: str = "moe.fused", fused: Callable[..., Any] = moe.fused
) -> AotSpec:
    """A layer of experts. `fused`: what runs it."""
    model = EXPERTS[name]
    stacks = ((2 * model.width, model.hidden), (model.hidden, model.width))

    def run(
        x: jax.Array,
        tensors: list[dict[str, jax.Array]],
        weights: jax.Array,
        ids: jax.Array,
        expert_map: jax.Array,
    ) -> jax.Array:
        w13, w2 = (_weight(fmt, t, *stack, model.held) for t, stack in zip(tensors, stacks, strict=True))
        given = [wrap(each) for each in (x, weights, ids, expert_map)]
        with environment():
            return array(
                fused(given[0], w13, w2, given[1], given[2], ExpertSpec(activation="silu"), expert_map=given[3])
            )

    routed = (num_tokens, model.top_k)
    args = (
        jax.ShapeDtypeStruct((num_tokens, model.hidden), jnp.bfloat16),
        [packed_shapes(fmt, *stack, model.held) for stack in stacks],
        jax.ShapeDtypeStruct(routed, jnp.float32),
        jax.ShapeDtypeStruct(routed, jnp.int32),
        jax.ShapeDtypeStruct((model.num_experts,), jnp.int32),
    )
    case = f"{fmt}, {name}, {num_tokens} tokens"
    return AotSpec(op=op, case=case, fn=run, args=args, uncopied=1, chips=_chips(num_tokens))


def _chips(num_tokens: int) -> tuple[str, ...]:
    return tuple(CHIPS) if num_tokens == FOR_ALL else ONE


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


AOT = (
    *(_linear(fmt, name, n) for fmt in LINEAR_FORMATS for name, n in LINEAR_TOKENS),
    *(_linear(fmt, "down", 4096) for fmt in LONG_FORMATS),
    *(experts(fmt, name, n) for name, formats in EXPERT_FORMATS.items() for fmt in formats for n in EXPERT_TOKENS),
    *(experts("dense", name, 4096) for name in EXPERTS),
)
