"""Ops: one file a family. Importing this package registers every op in `registry.OPS`."""

from sglang_core.ops import (
    activation,
    attention,
    embedding,
    gemm,
    linear_gated,
    logits,
    lora,
    mla,
    moe,
    norm,
    rope,
    rope_paged,
    sampling,
    ssm,
)
from sglang_core.ops.registry import OPS, OpDef, op

__all__ = [
    "OPS",
    "OpDef",
    "activation",
    "attention",
    "embedding",
    "gemm",
    "linear_gated",
    "logits",
    "lora",
    "mla",
    "moe",
    "norm",
    "op",
    "rope",
    "rope_paged",
    "sampling",
    "ssm",
]
