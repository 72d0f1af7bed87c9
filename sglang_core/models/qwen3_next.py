"""Qwen3-Next: gated delta nets in most layers, gated attention in the others, and a mixture of many small experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from sglang_core.errors import ConfigError
from sglang_core.layers.attention import Attention
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.gated_delta_net import GatedDeltaConfig, GatedDeltaNet
from sglang_core.layers.mlp import GatedMLP
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.module import Module
from sglang_core.layers.moe import MoE
from sglang_core.layers.norm import RMSNorm

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3NextConfig(ModelConfig):
    """`linear` says of each layer whether it is a gated delta net, or attends."""

    delta: GatedDeltaConfig
    linear: tuple[bool, ...]


class Qwen3NextLayer(Module):
    def __init__(self, cfg: Qwen3NextConfig, layer_id: int) -> None:
        super().__init__()
        self.is_linear = cfg.linear[layer_id]
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=cfg.norm_offset)
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(cfg, cfg.delta)
        else:
            self.self_attn = Attention(cfg, layer_id)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=cfg.norm_offset)
        self.mlp = MoE(cfg) if cfg.moe is not None and cfg.moe.sparse[layer_id] else GatedMLP(cfg)

    def forward(self, h: Tensor, residual: Tensor | None, fb: ForwardBatch) -> tuple[Tensor, Tensor]:
        """h, residual: [T, M] -> the same; the sum h + residual is what flows on."""
        h, residual = self.input_layernorm(h, residual)
        h = self.linear_attn(h, fb) if self.is_linear else self.self_attn(h, fb)
        h, residual = self.post_attention_layernorm(h, fb.kept(residual))
        return self.mlp(h), residual


class Qwen3NextForCausalLM(CausalLM):
    layer = Qwen3NextLayer
    ignored = ("mtp.",)  # the multi-token-prediction layer

    @classmethod
    def read_config(cls, hf_config: Mapping[str, Any]) -> Qwen3NextConfig:
        base = ModelConfig.from_hf(hf_config)
        facts = {f.name: getattr(base, f.name) for f in fields(base)}
        linear = _linear_layers(hf_config, base.num_layers)
        return Qwen3NextConfig(**facts, delta=GatedDeltaConfig.from_hf(hf_config), linear=linear)


def _linear_layers(hf: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Newer files list the layers' types; older ones say that every so many attends."""
    every = int(hf.get("full_attention_interval") or 4)
    kinds = hf.get("layer_types") or [FULL if (i + 1) % every == 0 else LINEAR for i in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {LINEAR, FULL}:
        raise ConfigError(
            f"config.json: layer_types has {len(kinds)} entries of kinds {', '.join(sorted(set(kinds)))}; "
            f"there must be {num_layers} of {LINEAR}, {FULL}"
        )
    return tuple(kind == LINEAR for kind in kinds)
