"""GPT-OSS: attention with sinks, windows in every other layer, and experts with biases behind a clamped SwiGLU."""

from __future__ import annotations

from torch import Tensor

from sglang_core.layers.attention import Attention
from sglang_core.layers.build import BuildContext, Layer
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.experts import StackedExperts
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.module import Module
from sglang_core.layers.moe import Router
from sglang_core.layers.norm import RMSNorm


class GptOssMLP(Layer):
    """Experts alone, with no shared one."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.moe is not None, "every layer has experts"
        self.router = Router(cfg.hidden_size, cfg.moe, bias=True)
        self.experts = StackedExperts(cfg.hidden_size, cfg.moe)

    def bind(self, ctx: BuildContext) -> None:
        self._tp = ctx.tp

    def forward(self, h: Tensor) -> Tensor:
        """h: [T, M] -> [T, M]."""
        return self._tp.all_reduce(self.experts(h, *self.router.route(h)))


class GptOssLayer(Module):
    def __init__(self, cfg: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, layer_id)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.input_layernorm.feeds(self.self_attn.qkv_proj)
        self.mlp = GptOssMLP(cfg)

    def forward(self, h: Tensor, residual: Tensor | None, fb: ForwardBatch) -> tuple[Tensor, Tensor]:
        """h, residual: [T, M] -> the same; the sum h + residual is what flows on."""
        h, residual = self.input_layernorm(h, residual)
        h, residual = self.post_attention_layernorm(self.self_attn(h, fb), fb.kept(residual))
        return self.mlp(h), residual


class GptOssForCausalLM(CausalLM):
    layer = GptOssLayer
