"""Mixtral: Llama with a mixture of experts in every layer."""

from __future__ import annotations

from torch import Tensor

from sglang_core.layers.attention import Attention
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.module import Module
from sglang_core.layers.moe import MoE
from sglang_core.layers.norm import RMSNorm


class MixtralLayer(Module):
    def __init__(self, cfg: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, layer_id)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.block_sparse_moe = MoE(cfg, names=("w1", "w3", "w2"))
        self.input_layernorm.feeds(self.self_attn.qkv_proj)

    def forward(self, h: Tensor, residual: Tensor | None, fb: ForwardBatch) -> tuple[Tensor, Tensor]:
        """h, residual: [T, M] -> the same; the sum h + residual is what flows on."""
        h, residual = self.input_layernorm(h, residual)
        h, residual = self.post_attention_layernorm(self.self_attn(h, fb), fb.kept(residual))
        return self.block_sparse_moe(h), residual


class MixtralForCausalLM(CausalLM):
    layer = MixtralLayer
