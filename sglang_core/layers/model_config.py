"""`ModelConfig`: the facts of a dense decoder, read from a checkpoint's config.json whatever generation wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from sglang_core.errors import ConfigError
from sglang_core.layers.kv_scheme import KVScheme, read_kv_scheme
from sglang_core.layers.moe_config import EXPERT_COUNTS, MoEConfig, read_moe
from sglang_core.layers.quant_config import QuantConfig, read_quant_config
from sglang_core.ops.activation import GateKind
from sglang_core.ops.rope import RopeSpec

ACTIVATIONS: Mapping[str, GateKind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
SLIDING, FULL_ATTENTION = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What config.json leaves unsaid for one `model_type`: values it may omit, and facts it never states."""

    defaults: Mapping[str, Any] = field(default_factory=dict)  # by config.json key
    facts: Mapping[str, Any] = field(default_factory=dict)  # by ModelConfig field


_GEMMA = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(defaults={"vocab_size": 32000, "max_position_embeddings": 2048}),
        "mistral": Family(
            defaults={"sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8}
        ),
        "qwen2": Family(defaults={"max_position_embeddings": 32768}, facts={"qkv_bias": True}),
        "qwen3": Family(defaults={"max_position_embeddings": 32768, "head_dim": 128}, facts={"qk_norm": True}),
        "mixtral": Family(
            defaults={
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
            }
        ),
        "qwen2_moe": Family(
            defaults={
                "num_local_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "num_key_value_heads": 16,
                "max_position_embeddings": 32768,
                "qkv_bias": True,
            }
        ),
        "qwen3_moe": Family(
            defaults={
                "num_local_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
            },
            facts={"qk_norm": True},
        ),
        "qwen3_next": Family(
            defaults={
                "num_local_experts": 512,
                "num_experts_per_tok": 10,
                "norm_topk_prob": True,
                "moe_intermediate_size": 512,
                "shared_expert_intermediate_size": 512,
                "num_key_value_heads": 2,
                "head_dim": 256,
                "partial_rotary_factor": 0.25,
                "max_position_embeddings": 32768,
            },
            facts={"qk_norm": True, "norm_offset": True, "attn_output_gate": True},
        ),
        "gpt_oss": Family(
            defaults={
                "num_local_experts": 128,
                "num_experts_per_tok": 4,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 150000.0,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "original_max_position_embeddings": 4096,
                    "truncate": False,
                },
                "sliding_window": 128,
                "sliding_window_pattern": 2,
                "attention_bias": True,
            },
            facts={"attn_sinks": True},
        ),
        "deepseek_v2": Family(defaults={"vocab_size": 102400, "head_dim": 64, "max_position_embeddings": 2048}),
        "deepseek_v3": Family(defaults={"vocab_size": 129280, "head_dim": 64, "max_position_embeddings": 4096}),
        "phi3": Family(
            defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
            facts={"fused_projections": True},
        ),
        "gemma2": Family(
            defaults=_GEMMA
            | {
                "vocab_size": 256000,
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "sliding_window_pattern": 2,
            },
            facts={"norm_offset": True},
        ),
        "gemma3_text": Family(
            defaults=_GEMMA
            | {
                "vocab_size": 262208,
                "max_position_embeddings": 131072,
                "sliding_window_pattern": 6,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
            },
            facts={"norm_offset": True, "qk_norm": True},
        ),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """What the language-model head needs. `tied_to` names the embedding whose table it shares, if it does."""

    vocab_size: int
    hidden_size: int
    soft_cap: float | None
    tied_to: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A dense decoder. Sizes are the whole model's, not a rank's; `windows` and `ropes` have one entry a layer."""

    architecture: str
    model_type: str
    dtype: str  # of the checkpoint: "bfloat16"
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    activation: GateKind
    query_scale: float  # multiplies q . k
    windows: tuple[int | None, ...]
    ropes: tuple[RopeSpec, ...]
    attn_soft_cap: float | None = None
    attn_sinks: bool = False  # a learned logit a head joins each softmax, with no value
    attn_output_gate: bool = (
        False  # each head's output is multiplied by a sigmoid, which q_proj projects beside the query
    )
    final_soft_cap: float | None = None
    embed_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_projections: bool = False  # the checkpoint has q, k, v as one matrix, and gate, up as another
    norm_offset: bool = False  # norms multiply by 1 + weight
    tie_embeddings: bool = False
    quantization: QuantConfig | None = None  # of the checkpoint's linear layers
    kv_scheme: KVScheme | None = None  # what the checkpoint says of cached keys and values
    moe: MoEConfig | None = None

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Read config.json (its `text_config` where it has one). Raises ConfigError on what is missing or not supported."""
        return _parse(hf_config)

    def config_for_head(self, *, tied_to: str) -> HeadConfig:
        """The head's facts; `tied_to` names the embedding, for models that tie it."""
        return HeadConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            soft_cap=self.final_soft_cap,
            tied_to=tied_to if self.tie_embeddings else None,
        )

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some facts changed."""
        return replace(self, **changes)


def _parse(hf_config: Mapping[str, Any]) -> ModelConfig:
    hf = text_config(hf_config)
    _refuse_unsupported(hf)
    num_layers, num_heads, hidden = (_int(hf, k) for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    head_dim = hf.get("head_dim") or hidden // num_heads
    layer_types = _layer_types(hf, num_layers)
    ropes = {kind: _rope(hf, head_dim, kind) for kind in dict.fromkeys(layer_types)}
    is_gemma = hf["model_type"].startswith("gemma")
    facts = dict(FAMILIES[hf["model_type"]].facts) if hf["model_type"] in FAMILIES else {}
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(
        architecture=(hf_config.get("architectures") or ["?"])[0],
        model_type=hf["model_type"],
        dtype=hf.get("dtype") or hf.get("torch_dtype") or "bfloat16",
        hidden_size=hidden,
        intermediate_size=_int(hf, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        vocab_size=_int(hf, "vocab_size"),
        max_position=_int(hf, "max_position_embeddings"),
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        activation=_activation(hf),
        query_scale=float(hf.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        windows=tuple(int(hf["sliding_window"]) if kind == SLIDING else None for kind in layer_types),
        ropes=tuple(ropes[kind] for kind in layer_types),
        attn_soft_cap=hf.get("attn_logit_softcapping"),
        final_soft_cap=hf.get("final_logit_softcapping"),
        embed_scale=hidden**0.5 if is_gemma else 1.0,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        quantization=read_quant_config(hf["quantization_config"]) if hf.get("quantization_config") else None,
        kv_scheme=read_kv_scheme(hf["quantization_config"]) if hf.get("quantization_config") else None,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        moe=read_moe(hf, num_layers, _activation(hf)),
        **({"qkv_bias": bool(hf.get("qkv_bias", bias)), "o_bias": bias} | facts),
    )


def text_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json, with its family's defaults filled in."""
    nested = hf_config.get("text_config")
    own = dict(hf_config) if nested is None else dict(nested) | _inherited(hf_config)
    model_type = own.setdefault("model_type", "?")
    defaults = dict(FAMILIES[model_type].defaults) if model_type in FAMILIES else {}
    if any(own.get(key) for key in EXPERT_COUNTS):
        defaults.pop("num_local_experts", None)
    return {**defaults, **own}


def _inherited(outer: Mapping[str, Any]) -> dict[str, Any]:
    """What a nested config takes from the one around it."""
    return {
        k: outer[k]
        for k in ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
        if outer.get(k) is not None
    }


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    if hf.get("use_bidirectional_attention"):
        raise ConfigError(
            "use_bidirectional_attention=true is an embedding model's; only causal decoders are supported"
        )


def _int(hf: Mapping[str, Any], key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key}={value!r} must be a positive integer")
    return value


def _activation(hf: Mapping[str, Any]) -> GateKind:
    name = hf.get("hidden_activation") or hf.get("hidden_act") or "silu"
    if name not in ACTIVATIONS:
        raise ConfigError(f"config.json: hidden_act={name!r} is not supported (there are {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def _layer_types(hf: Mapping[str, Any], num_layers: int) -> list[str]:
    """Which layers see a window only. Newer files list them; older ones give a pattern, or a first layer, or neither."""
    window, model_type = hf.get("sliding_window"), hf["model_type"]
    if not window or (model_type.startswith("qwen") and not hf.get("use_sliding_window", False)):
        return [FULL_ATTENTION] * num_layers
    if model_type in (
        "mistral",
        "mixtral",
        "phi3",
        "qwen3_moe",
    ):  # every layer; their `layer_types`, if any, are not read by anybody
        return [SLIDING] * num_layers
    if given := hf.get("layer_types"):
        return _checked_layer_types(list(given), num_layers)
    if model_type == "qwen2_moe":
        first = hf.get("max_window_layers", 28)
        return [SLIDING if i % 2 == 0 and i < first else FULL_ATTENTION for i in range(num_layers)]
    if model_type.startswith("qwen"):
        first = hf.get("max_window_layers", 28)
        return [SLIDING if i >= first else FULL_ATTENTION for i in range(num_layers)]
    if pattern := hf.get("sliding_window_pattern"):
        return [SLIDING if (i + 1) % pattern else FULL_ATTENTION for i in range(num_layers)]
    return [FULL_ATTENTION] * num_layers


def _checked_layer_types(given: list[str], num_layers: int) -> list[str]:
    if len(given) != num_layers or not set(given) <= {SLIDING, FULL_ATTENTION}:
        raise ConfigError(
            f"config.json: layer_types has {len(given)} entries of kinds {', '.join(sorted(set(given)))}; "
            f"there must be {num_layers} of {SLIDING}, {FULL_ATTENTION}"
        )
    return given


def _rope(hf: Mapping[str, Any], head_dim: int, layer_type: str) -> RopeSpec:
    return RopeSpec.from_config(_rope_config(hf), head_dim=head_dim, layer_type=layer_type)


def _rope_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json with one family's oddity made plain: early Phi-3 files say "yarn" or "su" and mean longrope."""
    scaling = hf.get("rope_scaling")
    if hf["model_type"] == "phi3" and scaling:
        return {**hf, "rope_scaling": {**scaling, "rope_type": "longrope"}}
    return hf
