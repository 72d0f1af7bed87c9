"""Each feature matters: a model built without it, or slightly wrong, is further from transformers than parity allows.

Without these, the parity tests could pass because a feature moves nothing at the sizes they use.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sglang_core.layers.model_config import ModelConfig
from sglang_core.models.registry import model_config
from sglang_core.ops.moe import ExpertSpec
from sglang_core.ops.rope import RopeSpec
from sglang_core.weights.checkpoint import read_config
from tests.models.harness import Stepper, load
from tests.models.test_parity import BOUND, error
from tests.models.tiny import CASES, reference

Change = Callable[[ModelConfig], dict[str, Any]]


def facts(**changes: Any) -> Change:
    return lambda cfg: changes


def ropes(**changes: Any) -> Change:
    return lambda cfg: {"ropes": tuple(replace(r, **changes) for r in cfg.ropes)}


def windows(change: Callable[[int], int | None]) -> Change:
    return lambda cfg: {"windows": tuple(None if w is None else change(w) for w in cfg.windows)}


def rope_of(layer: int) -> Change:
    """Every layer rotates as layer `layer` does."""
    return lambda cfg: {"ropes": (cfg.ropes[layer],) * cfg.num_layers}


def swapped_layer_types(cfg: ModelConfig) -> dict[str, Any]:
    window = next(w for w in cfg.windows if w is not None)
    return {"windows": tuple(window if w is None else None for w in cfg.windows)}


def full_rotation(cfg: ModelConfig) -> dict[str, Any]:
    def whole(rope: RopeSpec) -> RopeSpec:
        return replace(rope, rotary_dim=rope.head_dim)

    return {"ropes": tuple(whole(r) for r in cfg.ropes)}


def moe(**changes: Any) -> Change:
    return lambda cfg: {"moe": replace(cfg.moe, **changes)}  # type: ignore[type-var]


def moe_route(**changes: Any) -> Change:
    return lambda cfg: {"moe": replace(cfg.moe, route=replace(cfg.moe.route, **changes))}  # type: ignore[type-var, union-attr]


def moe_experts(**changes: Any) -> Change:
    return lambda cfg: {"moe": replace(cfg.moe, experts=replace(cfg.moe.experts, **changes))}  # type: ignore[type-var, union-attr]


FEATURES: dict[str, tuple[str, Change]] = {
    "rope style": ("llama2", ropes(style="interleaved")),
    "rope base": ("llama2", ropes(theta=10000.0)),
    "norm eps": ("llama2", facts(rms_norm_eps=1e-6)),
    "llama3 rope": ("llama31", ropes(kind="default")),
    "llama3 rope factor": ("llama32", ropes(factor=8.0)),
    "yarn rope": ("llama-yarn", ropes(kind="default")),
    "yarn attention factor": ("llama-yarn", ropes(attention_factor=1.0)),
    "linear rope": ("llama-linear", ropes(kind="default")),
    "query scale": ("llama3", facts(query_scale=1.0)),
    "window": ("mistral", windows(lambda w: None)),
    "window, one less": ("mistral", windows(lambda w: w - 1)),
    "window of some layers": ("qwen2", windows(lambda w: None)),
    "which layers are windowed": ("qwen2", swapped_layer_types),
    "window of phi3": ("phi3", windows(lambda w: None)),
    "partial rotation": ("phi3-partial", full_rotation),
    "longrope, short": ("phi3-short", ropes(kind="default")),
    "longrope, long": ("phi3-long", ropes(kind="default")),
    "longrope long factors": ("phi3-long", ropes(original_max_position=256)),
    "longrope attention factor": ("phi3-long", ropes(attention_factor=1.0)),
    "score soft cap": ("gemma2", facts(attn_soft_cap=None)),
    "logit soft cap": ("gemma2", facts(final_soft_cap=None)),
    "query scale of gemma2": ("gemma2", facts(query_scale=0.25)),
    "embedding scale": ("gemma2", facts(embed_scale=1.0)),
    "norm offset": ("gemma2", facts(norm_offset=False)),
    "activation": ("gemma2", facts(activation="silu")),
    "tanh in gelu": ("gemma2", facts(activation="gelu")),
    "window of gemma2": ("gemma2", windows(lambda w: None)),
    "which layers of gemma2 are windowed": ("gemma2", swapped_layer_types),
    "local rope base": ("gemma3", rope_of(1)),
    "global rope": ("gemma3", rope_of(0)),
    "window of gemma3": ("gemma3", windows(lambda w: None)),
    "logit soft cap of gemma3": ("gemma3", facts(final_soft_cap=None)),
    "query scale of gemma3": ("gemma3", facts(query_scale=0.25)),
    "window of mixtral": ("mixtral", windows(lambda w: None)),
    "second expert of mixtral": ("mixtral", moe_route(top_k=1)),
    "weights of mixtral sum to one": ("mixtral", moe_route(renormalize=False)),
    "softmax over all experts": ("qwen2-moe", moe_route(scoring="softmax_after_top_k")),
    "no renormalising of qwen2-moe": ("qwen2-moe", moe_route(renormalize=True)),
    "renormalising, as told": ("qwen3-moe", moe_route(renormalize=False)),
    "weights on the output": ("mixtral", moe(experts=ExpertSpec(weight_on_input=True))),
    "expert activation": ("qwen3-moe", moe(experts=ExpertSpec(activation="gelu"))),
    "which layers of qwen2-moe are windowed": ("qwen2-moe-window", swapped_layer_types),
    "window of gpt-oss": ("gpt-oss", windows(lambda w: None)),
    "which layers of gpt-oss are windowed": ("gpt-oss-default", swapped_layer_types),
    "yarn of gpt-oss": ("gpt-oss", ropes(kind="default")),
    "yarn's range in whole dims": ("gpt-oss", ropes(truncate=True)),
    "limit of the gate": ("gpt-oss", moe_experts(limit=7.0)),
    "slope of the gate": ("gpt-oss", moe_experts(alpha=1.702)),
    "clamped gate": ("gpt-oss", moe_experts(activation="silu")),
    "softmax over the chosen experts": ("gpt-oss", moe_route(scoring="softmax")),
    "second expert of gpt-oss": ("gpt-oss", moe_route(top_k=1)),
    "rope style of deepseek2": ("deepseek-v2", ropes(style="neox")),
    "rope style of deepseek3": ("deepseek-v3", ropes(style="neox")),
    "other rope style of deepseek3": ("deepseek-v3-neox", ropes(style="interleaved")),
    "yarn of deepseek": ("deepseek-v3", ropes(kind="default")),
    "mscale of cosines": ("deepseek-v3", ropes(attention_factor=1.0)),
    "mscale of scores": ("deepseek-v3", facts(query_scale=20**-0.5)),
    "mscale of scores of deepseek2": ("deepseek-v2", facts(query_scale=20**-0.5)),
    "softmax over experts": ("deepseek-v2", moe_route(scoring="sigmoid")),
    "expert groups of deepseek2": ("deepseek-v2", moe_route(num_groups=1, top_groups=1)),
    "score of a group, deepseek2": ("deepseek-v2", moe_route(group_score="top2_sum")),
    "number of experts": ("deepseek-v2-lite", moe_route(top_k=2)),
    "scale of experts": ("deepseek-v2-lite", moe_route(scale=1.0)),
    "no renormalising of deepseek2": ("deepseek-v2-lite", moe_route(renormalize=True)),
    "sigmoid scores": ("deepseek-v3", moe_route(scoring="softmax")),
    "expert groups of deepseek3": ("deepseek-v3", moe_route(num_groups=1, top_groups=1)),
    "renormalising of deepseek3": ("deepseek-v3", moe_route(renormalize=False)),
    "scale of experts of deepseek3": ("deepseek-v3", moe_route(scale=1.0)),
    "partial rotation of qwen3-next": ("qwen3-next", full_rotation),
    "norm offset of qwen3-next": ("qwen3-next", facts(norm_offset=False)),
    "renormalising of qwen3-next": ("qwen3-next", moe_route(renormalize=False)),
}
# Features with weights of their own: left out of the checkpoint as well.
WEIGHTED: dict[str, tuple[str, Change, str]] = {
    "qk norm": ("qwen3", facts(qk_norm=False), "_norm.weight"),
    "qk norm of gemma3": ("gemma3", facts(qk_norm=False), "_norm.weight"),
    "qkv bias": ("qwen2", facts(qkv_bias=False), "_proj.bias"),
    "attention biases": ("llama-bias", facts(qkv_bias=False, o_bias=False), "_proj.bias"),
    "output bias": ("llama-bias", facts(o_bias=False), "o_proj.bias"),
    "mlp bias": ("llama-bias", facts(mlp_bias=False), "_proj.bias"),
    "bias of deepseek": ("deepseek-v3-neox", facts(qkv_bias=False, o_bias=False), ".bias"),
    "output bias of deepseek": ("deepseek-v3-neox", facts(o_bias=False), "o_proj.bias"),
    "shared experts": ("deepseek-v2-lite", moe(shared_size=0), "shared_experts"),
    "bias of the choice of experts": ("deepseek-v3-neox", moe_route(has_bias=False), "e_score_correction_bias"),
    "bias of the choice of groups": ("deepseek-v3", moe_route(has_bias=False), "e_score_correction_bias"),
    "shared expert's gate": ("qwen2-moe", moe(shared_gate=False), "shared_expert_gate.weight"),
    "shared expert": ("qwen2-moe", moe(shared_gate=False, shared_size=0), ".shared_expert"),
    "qk norm of qwen3-moe": ("qwen3-moe", facts(qk_norm=False), "_norm.weight"),
    "bias of qwen2-moe": ("qwen2-moe", facts(qkv_bias=False), "_proj.bias"),
    "qk norm of qwen3-next": ("qwen3-next", facts(qk_norm=False), "_norm.weight"),
    "shared expert's gate of qwen3-next": ("qwen3-next", moe(shared_gate=False), "shared_expert_gate.weight"),
    "shared expert of qwen3-next": ("qwen3-next", moe(shared_gate=False, shared_size=0), ".shared_expert"),
    "sinks": ("gpt-oss", facts(attn_sinks=False), ".sinks"),
    "attention biases of gpt-oss": ("gpt-oss", facts(qkv_bias=False, o_bias=False), "_proj.bias"),
    "bias of qwen3": ("qwen3-bias", facts(qkv_bias=False, o_bias=False), "_proj.bias"),
}


# Biases that a model always has, at zero.
ZEROED: dict[str, tuple[str, str]] = {
    "router bias": ("gpt-oss", "router.bias"),
    "gate and up biases": ("gpt-oss", "gate_up_proj_bias"),
    "down biases": ("gpt-oss", "down_proj_bias"),
}


def distance(case: str, folder: Path, changes: dict[str, Any], checkpoints: Path) -> float:
    ref = reference(case, checkpoints)
    stepper = Stepper(load(folder, changes=changes, context_length=CASES[case].context_length))
    return error(stepper.logits(ref.tokens[0]), ref.logits[0])


@pytest.mark.parametrize("feature", FEATURES)
def test_without_it_logits_are_off(feature: str, checkpoints: Path) -> None:
    case, change = FEATURES[feature]
    folder = reference(case, checkpoints).folder
    changes = change(model_config(read_config(folder)))
    assert distance(case, folder, changes, checkpoints) > 10 * BOUND


@pytest.mark.parametrize("feature", WEIGHTED)
def test_without_its_weights_logits_are_off(feature: str, checkpoints: Path, tmp_path: Path) -> None:
    case, change, part = WEIGHTED[feature]
    folder = reference(case, checkpoints).folder
    changes = change(model_config(read_config(folder)))
    is_mlp = not changes.keys().isdisjoint({"mlp_bias", "route", "shared_size", "moe"})
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not (part in n and (".mlp." in n) is is_mlp)}
    assert kept.keys() < tensors.keys()
    save_file(kept, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    assert distance(case, tmp_path, changes, checkpoints) > 10 * BOUND


@pytest.mark.parametrize("feature", ZEROED)
def test_with_it_at_zero_logits_are_off(feature: str, checkpoints: Path, tmp_path: Path) -> None:
    case, part = ZEROED[feature]
    folder = reference(case, checkpoints).folder
    tensors = load_file(folder / "model.safetensors")
    assert any(part in name for name in tensors)
    save_file({n: t * (part not in n) for n, t in tensors.items()}, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    assert distance(case, tmp_path, {}, checkpoints) > 10 * BOUND
