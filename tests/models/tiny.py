"""Tiny random checkpoints of every architecture, written by transformers, and transformers' own logits on them.

Weights are drawn so that logits have a deviation of 1 or more and norms and biases are not at their resting values: at the
default initialisation a missing soft cap or bias would move nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 131  # odd: its parts are ragged at tp_size 2
PROMPT_LENS = (23, 9, 14)
NUM_NEW = 6
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK_YARN = YARN_ROPE | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
QWEN_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
}
QWEN3_NEXT = {
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
GPT_OSS = {
    "head_dim": 24,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "swiglu_limit": 1.5,
    "swiglu_alpha": 1.3,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 64, "sliding_window": 6}


def _longrope(original: int, dims: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0 + 0.1 * i for i in range(dims // 2)],
        "long_factor": [2.0 + 0.5 * i for i in range(dims // 2)],
        "original_max_position_embeddings": original,
    }


@dataclass(frozen=True)
class Case:
    """One checkpoint: transformers' config class and what differs from SIZES."""

    config: str
    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    context_length: int = 256


def _llama(**changes: Any) -> Case:
    return Case("LlamaConfig", "LlamaForCausalLM", changes)


def _phi3(original: int, context_length: int, **changes: Any) -> Case:
    return Case(
        "Phi3Config",
        "Phi3ForCausalLM",
        {"original_max_position_embeddings": original, **changes},
        context_length,
    )


def _deepseek(version: int, **changes: Any) -> Case:
    sizes = {
        "num_key_value_heads": 4,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.7,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    }
    return Case(f"DeepseekV{version}Config", f"DeepseekV{version}ForCausalLM", sizes | changes)


CASES: dict[str, Case] = {
    "llama2": _llama(
        num_key_value_heads=4, rms_norm_eps=0.05, rope_parameters={"rope_theta": 100.0, "rope_type": "default"}
    ),
    "llama3": _llama(rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}),
    "llama31": _llama(rope_parameters=LLAMA3_ROPE),
    "llama32": _llama(rope_parameters=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True, head_dim=32),
    "llama-bias": _llama(attention_bias=True, mlp_bias=True),
    "llama-mqa": _llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama-yarn": _llama(rope_parameters=YARN_ROPE),
    "llama-linear": _llama(rope_parameters=LINEAR_ROPE),
    "mistral": Case("MistralConfig", "MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": Case(
        "Qwen2Config", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Case("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-bias": Case("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True}),
    "mixtral": Case(
        "MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8}
    ),
    "qwen2-moe": Case(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        QWEN_MOE | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "num_experts_per_tok": 3},
    ),
    "qwen2-moe-window": Case(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        QWEN_MOE | {"qkv_bias": False, "use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": True},
    ),
    "qwen3-moe": Case(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        QWEN_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2, "head_dim": 24},
    ),
    "qwen3-moe-tied": Case("Qwen3MoeConfig", "Qwen3MoeForCausalLM", QWEN_MOE | {"tie_word_embeddings": True}),
    "qwen3-next": Case("Qwen3NextConfig", "Qwen3NextForCausalLM", QWEN_MOE | QWEN3_NEXT | {"num_hidden_layers": 4}),
    "qwen3-next-mlp": Case(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        QWEN_MOE
        | QWEN3_NEXT
        | {
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_num_value_heads": 2,
            "linear_conv_kernel_dim": 3,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
        },
    ),
    "phi3": _phi3(256, 256, sliding_window=10),
    "phi3-partial": _phi3(
        256, 256, rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    ),
    "phi3-short": _phi3(64, 64, rope_parameters=_longrope(64, 16)),
    "phi3-long": _phi3(8, 256, rope_parameters=_longrope(8, 12) | {"partial_rotary_factor": 0.75}),
    "gemma2": Case(
        "Gemma2Config", "Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0}
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "gpt-oss": Case(
        "GptOssConfig",
        "GptOssForCausalLM",
        GPT_OSS | {"rope_parameters": YARN_ROPE | {"truncate": False, "beta_fast": 8.0, "beta_slow": 1.0}},
    ),
    "gpt-oss-default": Case(
        "GptOssConfig",
        "GptOssForCausalLM",
        GPT_OSS
        | {
            "attention_bias": False,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    # Expanding pays from some 20 queries on a prefix: chunks of a few tokens are absorbed, whole prompts are expanded.
    "deepseek-v2": _deepseek(
        2, q_lora_rank=20, topk_method="group_limited_greedy", n_group=4, topk_group=2, rope_parameters=DEEPSEEK_YARN
    ),
    "deepseek-v2-lite": _deepseek(2, q_lora_rank=None, topk_method="greedy", num_hidden_layers=2),
    "deepseek-v3": _deepseek(3, q_lora_rank=20, n_group=4, topk_group=2, rope_parameters=DEEPSEEK_YARN),
    "deepseek-v3-neox": _deepseek(
        3, q_lora_rank=20, n_group=1, topk_group=1, rope_interleave=False, attention_bias=True, num_hidden_layers=2
    ),
}


def hf_model(name: str) -> Any:
    """The transformers model of a case, in float32, with eager attention (the only kind that has soft caps)."""
    case = CASES[name]
    config = getattr(transformers, case.config)(
        **{**SIZES, **case.changes}, attn_implementation="eager", dtype="float32"
    )
    model = getattr(transformers, case.model)(config).eval()
    for module in model.modules():  # transformers up to 5.17 has them as numbers in its code
        if hasattr(module, "limit") and hasattr(config, "swiglu_limit"):
            module.alpha, module.limit = config.swiglu_alpha, config.swiglu_limit
    randomize(model)
    return model


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:  # a matrix, or a stack of experts
                p.copy_(noise * (1.5 / p.shape[-1] ** 0.5))
            elif name.endswith("A_log"):
                p.copy_(noise * 0.5 - 2.0)  # half of a state is left after some ten tokens, and not after one
            elif name.endswith("bias"):
                p.copy_(noise * 0.5)
            else:
                p.copy_(noise * 0.5 + 1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)


@dataclass(frozen=True)
class Reference:
    """A checkpoint on disk, and per prompt: its tokens followed by transformers' greedy ones, and the logits of them all."""

    folder: Path
    tokens: tuple[list[int], ...]
    logits: tuple[Tensor, ...]  # [len(tokens), V]


@cache
def reference(name: str, root: Path) -> Reference:
    folder = root / name
    model = hf_model(name)
    # Several shards in one case, so that the index is read too.
    model.save_pretrained(folder, max_shard_size="60KB" if name == "llama3" else "50GB")
    generator = torch.Generator().manual_seed(1)
    tokens, logits = [], []
    with torch.no_grad():
        for length in PROMPT_LENS:
            ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            for _ in range(NUM_NEW):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            tokens.append(ids)
            logits.append(model(torch.tensor([ids])).logits[0].float())
    return Reference(folder, tuple(tokens), tuple(logits))
