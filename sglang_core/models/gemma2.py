"""Gemma 2: norms before and after each half of a layer, every other layer windowed, soft caps on scores and logits."""

from __future__ import annotations

from torch import Tensor

from sglang_core.layers.attention import Attention
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.mlp import GatedMLP
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.module import Module
from sglang_core.layers.norm import RMSNorm


def _norm(cfg: ModelConfig) -> RMSNorm:
    return RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=cfg.norm_offset)


class Gemma2Layer(Module):
    def __init__(self, cfg: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(cfg)
        self.self_attn = Attention(cfg, layer_id)
        self.post_attention_layernorm = _norm(cfg)
        self.pre_feedforward_layernorm = _norm(cfg)
        self.mlp = GatedMLP(cfg)
        self.post_feedforward_layernorm = _norm(cfg)
        self.input_layernorm.feeds(self.self_attn.qkv_proj)
        self.pre_feedforward_layernorm.feeds(self.mlp.gate_up_proj)

    def forward(self, h: Tensor, residual: Tensor | None, fb: ForwardBatch) -> tuple[Tensor, Tensor]:
        """h, residual: [T, M] -> the same; the sum h + residual is what flows on."""
        h, residual = self.input_layernorm(h, residual)
        h = self.post_attention_layernorm.normalize(self.self_attn(h, fb))
        h, residual = self.pre_feedforward_layernorm(h, fb.kept(residual))
        return self.post_feedforward_layernorm.normalize(self.mlp(h)), residual


class Gemma2ForCausalLM(CausalLM):
    layer = Gemma2Layer
