"""What a model file is written with, for plugins that bring architectures (hook `sglang_models`). Imports torch."""

from __future__ import annotations

from sglang_core.layers.attention import Attention
from sglang_core.layers.build import BuildContext, Layer, WeightSpec
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.decoder import Decoder
from sglang_core.layers.embedding import Embedding, LMHead
from sglang_core.layers.forward_batch import ForwardBatch, StepState
from sglang_core.layers.linear import ColumnLinear, GateUpLinear, Linear, QKVLinear, RowLinear
from sglang_core.layers.mlp import GatedMLP
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.moe import MoE
from sglang_core.layers.norm import LayerNorm, RMSNorm
from sglang_core.layers.rope import Rope

__all__ = [
    "Attention",
    "BuildContext",
    "CausalLM",
    "Decoder",
    "ColumnLinear",
    "Embedding",
    "ForwardBatch",
    "GateUpLinear",
    "GatedMLP",
    "LMHead",
    "Layer",
    "LayerNorm",
    "Linear",
    "MoE",
    "ModelConfig",
    "QKVLinear",
    "RMSNorm",
    "Rope",
    "RowLinear",
    "StepState",
    "WeightSpec",
]
