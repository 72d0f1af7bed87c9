"""Products with weights: experts, fp8 blocks, four bits."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.gpu.load import Load, Work, size_of
from benchmarks.gpu.opened import Opened
from sglang_core.bench.op_calls import Step
from sglang_core.bench.op_calls import fused as fused_call
from sglang_core.bench.op_calls import linear as linear_call
from sglang_core.ops.moe import ExpertSpec
from sglang_core.ops.weight import PackedWeight

EXPERTS = {
    "DeepSeek-V3": {"X": 256, "K": 8, "M": 7168, "F": 2048},
    "GPT-OSS-120B": {"X": 128, "K": 4, "M": 2880, "F": 2880},
    "Qwen3-30B-A3B": {"X": 128, "K": 8, "M": 2048, "F": 768},
}
SMALL = {"X": 8, "K": 2, "M": 128, "F": 128}
FEW = 64  # rows up to which every provider's kernel of quantised weights is Triton's
FP8, INT4, MXFP4 = "fp8.block128", "int4.awq.g128", "mxfp4.g32"


def bytes_of(w: PackedWeight) -> int:
    return size_of(*(tensor for _, tensor in w.named_buffers()))


def fused(opened: Opened, *, model: str, tokens: int, fmt: str) -> Work:
    """Of the weights, those of the experts that some token goes to."""
    dims, tokens = (SMALL, min(tokens, 16)) if opened.small else (EXPERTS[model], tokens)
    make = opened.operands()
    bound = opened.bind(make, "moe.fused", fmt=fmt, spec=ExpertSpec(), dims=dims)
    call = fused_call(make, bound, Step(tokens))
    kernel = call.kernel[0]
    x, w13, w2, _, ids = kernel.args[:5]
    active = ids.unique().numel()
    stored = [call.body[0].args[i] for i in (1, 2)]
    each = sum(bytes_of(w) for w in stored) // dims["X"]
    return Work(
        call=kernel,
        provider=bound.provider,
        nbytes=active * each + 2 * size_of(x),
        flops=tokens * dims["K"] * 6 * dims["M"] * dims["F"],
        rate=2.0 if fmt == FP8 else 1.0,
    )


def linear(opened: Opened, *, tokens: int, width: int, out: int, fmt: str) -> Work:
    tokens, width, out = (min(tokens, 16), 256, 256) if opened.small else (tokens, width, out)
    make = opened.operands()
    facts: dict[str, Any] = {"fmt": fmt, "dims": {"in": width, "out": out}}
    bound = opened.bind(make, "gemm.linear", **facts)
    own = opened.asked_for("gemm.linear", **facts) if tokens > FEW or fmt == "dense" else {}
    call = linear_call(make, bound, Step(tokens))
    x, stored = call.body[0].args
    return Work(
        call=call.kernel[0],
        provider=bound.provider,
        nbytes=bytes_of(stored) + size_of(x) + tokens * out * x.element_size(),
        flops=2 * tokens * width * out,
        rate=2.0 if fmt == FP8 else 1.0,
        compared={name: partial(op.fn, x, stored) for name, op in own.items()},
    )


def experts(model: str, tokens: int, fmt: str, rank: int) -> Load:
    name = f"fused MoE {model}, {tokens} tokens, {'bf16' if fmt == 'dense' else fmt}"
    make = partial(fused, model=model, tokens=tokens, fmt=fmt)
    return Load(name=name, make=make, target=0.7, rank=rank, seconds=40 if tokens > 1000 else 25)


def product(name: str, tokens: int, width: int, out: int, fmt: str, target: float, rank: int) -> Load:
    make = partial(linear, tokens=tokens, width=width, out=out, fmt=fmt)
    return Load(name=f"{name}, {tokens} x {width} x {out}", make=make, target=target, rank=rank)


LOADS = [
    experts("Qwen3-30B-A3B", 64, "dense", 3),
    experts("DeepSeek-V3", 64, FP8, 4),
    product("fp8 block", 4096, 7168, 16_384, FP8, 0.7, 5),
    product("int4", 1, 8192, 8192, INT4, 0.75, 6),
    experts("Qwen3-30B-A3B", 4096, "dense", 10),
    experts("DeepSeek-V3", 4096, FP8, 11),
    product("fp8 block", 64, 7168, 16_384, FP8, 0.8, 12),
    product("int4", 32, 8192, 8192, INT4, 0.75, 13),
    experts("GPT-OSS-120B", 64, MXFP4, 17),
    experts("GPT-OSS-120B", 4096, MXFP4, 18),
    experts("Qwen3-30B-A3B", 1, "dense", 30),
    experts("DeepSeek-V3", 1, FP8, 31),
    product("fp8 block", 1, 7168, 16_384, FP8, 0.8, 32),
    product("int4", 8, 8192, 8192, INT4, 0.75, 33),
    product("bf16", 1, 4096, 28_672, "dense", 0.8, 36),
    product("bf16", 1, 14_336, 4096, "dense", 0.8, 37),
]
