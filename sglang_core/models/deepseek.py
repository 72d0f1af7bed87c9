"""DeepSeek V2, V2-Lite, V3, R1, and Kimi-K2: latent attention, and experts routed by groups beside shared ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from sglang_core.errors import ConfigError
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.mla import LatentAttention, MLAConfig
from sglang_core.layers.mlp import GatedMLP
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.module import Module
from sglang_core.layers.moe import MoE
from sglang_core.layers.moe_config import MoEConfig
from sglang_core.layers.norm import RMSNorm
from sglang_core.ops.moe import ExpertSpec, RouteSpec
from sglang_core.ops.rope import RopeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepseekConfig(ModelConfig):
    """A decoder with latent attention and `moe`."""

    mla: MLAConfig


class DeepseekLayer(Module):
    def __init__(self, cfg: DeepseekConfig, layer_id: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = LatentAttention(cfg, cfg.mla, layer_id)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        assert cfg.moe is not None
        self.mlp = MoE(cfg, shared="shared_experts") if cfg.moe.sparse[layer_id] else GatedMLP(cfg)

    def forward(self, h: Tensor, residual: Tensor | None, fb: ForwardBatch) -> tuple[Tensor, Tensor]:
        """h, residual: [T, M] -> the same; the sum h + residual is what flows on."""
        h, residual = self.input_layernorm(h, residual)
        h, residual = self.post_attention_layernorm(self.self_attn(h, fb), fb.kept(residual))
        return self.mlp(h), residual


class DeepseekV2ForCausalLM(CausalLM):
    layer = DeepseekLayer

    @classmethod
    def read_config(cls, hf_config: Mapping[str, Any]) -> DeepseekConfig:
        return _read(hf_config, cls.route_spec(hf_config), "interleaved")

    @classmethod
    def route_spec(cls, hf: Mapping[str, Any]) -> RouteSpec:
        """Softmax over all experts; weights as they come. Raises ConfigError for a routing that this model has not."""
        method = hf.get("topk_method") or "greedy"
        if method not in ("greedy", "gready", "group_limited_greedy") or hf.get("norm_topk_prob"):
            raise ConfigError(
                f"config.json: topk_method={method!r} with norm_topk_prob={hf.get('norm_topk_prob')} is not supported "
                "for DeepSeek-V2 (it takes greedy or group_limited_greedy, and norm_topk_prob=false)"
            )
        grouped = method == "group_limited_greedy"
        return RouteSpec(
            num_experts=int(hf["n_routed_experts"]),
            top_k=int(hf["num_experts_per_tok"]),
            num_groups=int(hf["n_group"]) if grouped else 1,
            top_groups=int(hf["topk_group"]) if grouped else 1,
            scale=float(hf.get("routed_scaling_factor", 1.0)),
        )


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """V3, R1 and Kimi-K2: sigmoid scores, whose choice a learned bias balances."""

    ignored = ("model.layers.61.",)  # the multi-token-prediction layer of V3 and R1, after its 61 layers

    @classmethod
    def read_config(cls, hf_config: Mapping[str, Any]) -> DeepseekConfig:
        style = "interleaved" if hf_config.get("rope_interleave", True) else "neox"
        return _read(hf_config, cls.route_spec(hf_config), style)

    @classmethod
    def route_spec(cls, hf: Mapping[str, Any]) -> RouteSpec:
        if hf.get("scoring_func", "sigmoid") != "sigmoid" or hf.get("topk_method", "noaux_tc") != "noaux_tc":
            raise ConfigError(
                f"config.json: scoring_func={hf.get('scoring_func')!r} with topk_method={hf.get('topk_method')!r} is not "
                "supported for DeepSeek-V3 (it takes sigmoid with noaux_tc)"
            )
        return RouteSpec(
            num_experts=int(hf["n_routed_experts"]),
            top_k=int(hf["num_experts_per_tok"]),
            scoring="sigmoid",
            num_groups=int(hf.get("n_group") or 1),
            top_groups=int(hf.get("topk_group") or 1),
            group_score="top2_sum",
            has_bias=True,
            renormalize=bool(hf.get("norm_topk_prob", True)),
            scale=float(hf.get("routed_scaling_factor", 2.5)),
        )


def _read(hf: Mapping[str, Any], route: RouteSpec, style: Any) -> DeepseekConfig:
    base = ModelConfig.from_hf(hf)
    mla = MLAConfig(
        q_rank=hf.get("q_lora_rank"),
        kv_rank=int(hf["kv_lora_rank"]),
        nope_dim=int(hf["qk_nope_head_dim"]),
        rope_dim=int(hf["qk_rope_head_dim"]),
        v_head_dim=int(hf["v_head_dim"]),
    )
    if hf.get("moe_layer_freq", 1) != 1:
        raise ConfigError(f"config.json: moe_layer_freq={hf['moe_layer_freq']} is not supported; it must be 1")
    rope = RopeSpec.from_config(hf, head_dim=mla.rope_dim, style=style)
    facts = {f.name: getattr(base, f.name) for f in fields(base)} | {
        "head_dim": mla.nope_dim + mla.rope_dim,
        "num_kv_heads": base.num_heads,
        "query_scale": (mla.nope_dim + mla.rope_dim) ** -0.5 * score_scale(hf),
        "ropes": (rope,) * base.num_layers,
    }
    num_dense = int(hf.get("first_k_dense_replace") or 0)
    facts["moe"] = MoEConfig(
        route=route,
        experts=ExpertSpec(activation=base.activation),
        intermediate_size=int(hf["moe_intermediate_size"]),
        sparse=tuple(i >= num_dense for i in range(base.num_layers)),
        shared_size=int(hf["moe_intermediate_size"]) * int(hf.get("n_shared_experts") or 0),
        router_float32=True,
    )
    return DeepseekConfig(**facts, mla=mla)


def score_scale(hf: Mapping[str, Any]) -> float:
    """What stretched rotary embeddings multiply scores by: mscale squared."""
    params = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind, all_dim = params.get("rope_type") or params.get("type") or "default", params.get("mscale_all_dim")
    if kind == "default" or not all_dim or params["factor"] <= 1:
        return 1.0
    return float((0.1 * all_dim * math.log(params["factor"]) + 1.0) ** 2)
