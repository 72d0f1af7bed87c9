"""`MoEConfig`: the facts of a model's mixture-of-experts layers, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_core.errors import ConfigError
from sglang_core.ops.moe import ExpertSpec, RouteSpec

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # one fact, by generation and family


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Sizes are the whole model's, not a rank's. `sparse` says of each layer whether it has experts, or a plain MLP."""

    route: RouteSpec
    experts: ExpertSpec
    intermediate_size: int  # of one expert
    sparse: tuple[bool, ...]
    shared_size: int = 0  # intermediate size of the expert that every token visits; 0: there is none
    shared_gate: bool = False  # its output is multiplied by a sigmoid of its own
    router_float32: bool = False  # router weights and logits in float32, whatever the model's dtype


def read_moe(hf: Mapping[str, Any], num_layers: int, activation: Any) -> MoEConfig | None:
    """The experts that config.json tells of, None where it tells of none. Raises ConfigError on what cannot be."""
    num_experts = next((hf[key] for key in EXPERT_COUNTS if hf.get(key)), None)
    read = _READERS.get(hf["model_type"])
    if num_experts is None or read is None:
        return None
    top_k = hf.get("num_experts_per_tok")
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ConfigError(f"config.json: num_experts_per_tok={top_k!r} must be between 1 and the {num_experts} experts")
    return read(hf, num_layers, num_experts, ExpertSpec(activation=activation))


def _mixtral(hf: Mapping[str, Any], num_layers: int, num_experts: int, experts: ExpertSpec) -> MoEConfig:
    return MoEConfig(
        route=RouteSpec(num_experts=num_experts, top_k=hf["num_experts_per_tok"], renormalize=True),
        experts=experts,
        intermediate_size=_size(hf, "intermediate_size"),
        sparse=(True,) * num_layers,
    )


def _qwen(hf: Mapping[str, Any], num_layers: int, num_experts: int, experts: ExpertSpec) -> MoEConfig:
    dense, step = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step", 1)
    shared = hf.get("shared_expert_intermediate_size", 0) if hf["model_type"] in ("qwen2_moe", "qwen3_next") else 0
    return MoEConfig(
        route=RouteSpec(
            num_experts=num_experts,
            top_k=hf["num_experts_per_tok"],
            renormalize=bool(hf.get("norm_topk_prob", False)),
        ),
        experts=experts,
        intermediate_size=_size(hf, "moe_intermediate_size"),
        sparse=tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers)),
        shared_size=shared,
        shared_gate=shared > 0,
    )


def _gpt_oss(hf: Mapping[str, Any], num_layers: int, num_experts: int, experts: ExpertSpec) -> MoEConfig:
    return MoEConfig(
        route=RouteSpec(num_experts=num_experts, top_k=hf["num_experts_per_tok"], scoring="softmax_after_top_k"),
        experts=ExpertSpec(
            activation="swiglu_clamped",
            alpha=float(hf.get("swiglu_alpha", 1.702)),
            limit=float(hf.get("swiglu_limit", 7.0)),
        ),
        intermediate_size=_size(hf, "intermediate_size"),
        sparse=(True,) * num_layers,
    )


def _size(hf: Mapping[str, Any], key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key}={value!r} must be a positive integer")
    return value


_READERS = {"mixtral": _mixtral, "qwen2_moe": _qwen, "qwen3_moe": _qwen, "qwen3_next": _qwen, "gpt_oss": _gpt_oss}
