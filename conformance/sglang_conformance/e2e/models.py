"""A tiny model of every architecture that core knows.

Sizes are small multiples of 32, so that kernels for real models take them. Windows are shorter than a page of 16 in some
models, and longer in others; a model has layers of each kind that its architecture mixes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_conformance.case import Profile
from sglang_conformance.e2e.checkpoint import CONTEXT, VOCAB, DemoModel, TinyModel

SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500.0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
QWEN_MOE = EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 64, "norm_topk_prob": True}
LATENTS = EXPERTS | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 24, "tie_word_embeddings": True}
DENSE = ("attn.paged",)
MOE = (*DENSE, "moe.route", "moe.fused")
MLA = ("attn.mla_paged", "moe.route", "moe.fused")
EVERY_OTHER = {"layer_types": ["sliding_attention", "full_attention"]}


def tiny(
    name: str,
    architecture: str,
    model_type: str,
    changes: Mapping[str, Any] | None = None,
    *,
    needs: tuple[Profile, ...] = (),
    covers: tuple[str, ...] = DENSE,
    full: bool = True,
) -> TinyModel:
    """A model of SIZES but for `changes`."""
    return TinyModel(
        name=name,
        architecture=architecture,
        model_type=model_type,
        sizes={**SIZES, **(changes or {})},
        needs=needs,
        covers=covers,
        full=full,
    )


MODELS: tuple[TinyModel, ...] = (
    tiny("llama", "LlamaForCausalLM", "llama", full=False),
    tiny(
        "mistral",
        "MistralForCausalLM",
        "mistral",
        {"sliding_window": 10},
        needs=("window",),
        full=False,
    ),
    tiny("qwen2", "Qwen2ForCausalLM", "qwen2"),
    tiny("qwen3", "Qwen3ForCausalLM", "qwen3", {"tie_word_embeddings": True}),
    tiny(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        {"sliding_window": 40, "original_max_position_embeddings": CONTEXT},
        needs=("window",),
    ),
    tiny(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        GEMMA | EVERY_OTHER | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0},
        needs=("window", "soft_cap"),
    ),
    tiny(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        GEMMA | EVERY_OTHER,
        needs=("window",),
    ),
    tiny(
        "gemma3-vl",
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {"text_config": {"model_type": "gemma3_text", **SIZES, **GEMMA, **EVERY_OTHER}},
        needs=("window",),
    ),
    tiny(
        "mixtral",
        "MixtralForCausalLM",
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
        covers=MOE,
        full=False,
    ),
    tiny(
        "qwen2-moe",
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        QWEN_MOE | {"mlp_only_layers": [0]},
        covers=MOE,
    ),
    tiny("qwen3-moe", "Qwen3MoeForCausalLM", "qwen3_moe", QWEN_MOE, covers=MOE),
    tiny(
        "gpt-oss",
        "GptOssForCausalLM",
        "gpt_oss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 10,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            },
        }
        | EVERY_OTHER,
        needs=("window", "sinks"),
        covers=MOE,
    ),
    tiny(
        "deepseek-v2",
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        LATENTS | {"topk_method": "group_limited_greedy"},
        covers=MLA,
    ),
    tiny(
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        LATENTS,
        covers=MLA,
        full=False,
    ),
    tiny(
        "qwen3-next",
        "Qwen3NextForCausalLM",
        "qwen3_next",
        QWEN_MOE
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "partial_rotary_factor": 0.5,
        },
        covers=(*MOE, "ssm.gated_delta_rule", "ssm.causal_conv1d", "ssm.gates", "norm.rms_gated"),
    ),
    DemoModel(name="demo", architecture="Qwen3ForCausalLM", model_type="qwen3", full=False),
)
